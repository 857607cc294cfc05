"""Which teacher layers a store keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.align.layer_map import ratio_map
from kvpipe.kvcache.errors import ConfigError
from kvpipe.kvcache.layers import select_layers

DEPTHS = st.integers(1, 130)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", (0, 1, 2, 3)),
        ("1,3", (1, 3)),
        ("3, 1,1", (1, 3)),
        ("0-2", (0, 1, 2)),
        ("0,2-3", (0, 2, 3)),
        ("ratio:2", (1, 3)),
        ("ratio:4", (0, 1, 2, 3)),
    ],
)
def test_layers_are_named(text: str, expected: tuple[int, ...]) -> None:
    assert select_layers(text, 4) == expected


@given(DEPTHS, DEPTHS)
def test_a_student_maps_onto_the_layers_kept_for_it_as_onto_all(student: int, teacher: int) -> None:
    student = min(student, teacher)
    kept = select_layers(f"ratio:{student}", teacher)
    assert [kept[layer] for layer in ratio_map(student, len(kept))] == list(ratio_map(student, teacher))


def test_a_range_goes_up() -> None:
    with pytest.raises(ConfigError, match=r"expected 1-3, from the lower number to the higher, found 3-1"):
        select_layers("3-1", 4)


@pytest.mark.parametrize("text", ["", "4", "-1", "1-9", "3-1", "x", "1,,2", "ratio:0", "ratio:5", "ratio:x", "1.5"])
def test_layers_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no such layers: expected .*, found .*Mend --layers"):
        select_layers(text, 4)
