"""Projections of matched size have as many weights as they are matched with, or a little fewer."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from kvpipe.kvcache.align.aligner import Aligner, AlignerConfig, Mode
from kvpipe.kvcache.align.head_projection import KVSpace
from kvpipe.kvcache.align.parameter_match import Match, matched_size

SPACES = st.builds(KVSpace, st.integers(1, 4), st.integers(2, 9))
LAYERS = 2


def weights(mode: Mode, match: Match, source: KVSpace, target: KVSpace, *, share: bool = True) -> int:
    """Trainable numbers of a projection, but for the bias that all have."""
    size = matched_size(mode, match, source, target, share_dim_proj=share)
    config = AlignerConfig(mode, "student-to-teacher", LAYERS, source, target, share_dim_proj=share, size=size)
    return sum(parameter.numel() for parameter in Aligner(config).parameters()) - LAYERS * 2 * target.features


@given(SPACES, SPACES, st.booleans())
def test_structured_grows_to_the_size_of_flat(source: KVSpace, target: KVSpace, share: bool) -> None:
    plain = weights("structured", "none", source, target, share=share)
    wanted, found = weights("flat", "none", source, target), weights("structured", "flat", source, target, share=share)
    assume(plain <= wanted)
    assert found <= wanted < found + plain


@given(SPACES, SPACES)
def test_flat_shrinks_to_the_size_of_structured(source: KVSpace, target: KVSpace) -> None:
    one_rank = LAYERS * 2 * (source.features + target.features)
    wanted, found = weights("structured", "none", source, target), weights("flat", "structured", source, target)
    assume(one_rank <= wanted)
    assert found <= wanted < found + one_rank


@given(SPACES, SPACES, st.sampled_from(["flat", "structured"]))
def test_a_bottleneck_fits_either(source: KVSpace, target: KVSpace, match: Match) -> None:
    wanted, found = weights(match, "none", source, target), weights("bottleneck", match, source, target)
    one_unit = LAYERS * 2 * (source.features + target.features + 1)
    assume(one_unit + LAYERS * 2 * 2 * source.features <= wanted)
    assert found <= wanted < found + one_unit


@pytest.mark.parametrize("mode", ["structured", "flat"])
def test_a_projection_matched_with_itself_is_as_it_is(mode: Mode) -> None:
    spaces = KVSpace(2, 24), KVSpace(4, 32)
    assert weights(mode, mode, *spaces) == weights(mode, "none", *spaces)  # type: ignore[arg-type]


def test_there_is_always_something_left() -> None:
    assert matched_size("bottleneck", "flat", KVSpace(1, 1), KVSpace(1, 1), share_dim_proj=True) == 1
