"""Many samples in one array each: every one of them comes back as it was."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.data.packed_tokens import PackedTokens
from kvpipe.data.tokenize import TokenizedSample


def tokenized(length: int, seed: int) -> TokenizedSample:
    rng = np.random.default_rng(seed)
    return TokenizedSample(
        rng.integers(0, 2**31 - 1, length, np.int32),
        rng.integers(0, 3, length, np.int8),
        rng.integers(0, 2**31 - 1, (length, 2), np.int32),
        truncated=bool(rng.integers(2)),
    )


@given(st.lists(st.integers(1, 7), max_size=9))
def test_samples_come_back_as_they_were(lengths: list[int]) -> None:
    samples = [tokenized(length, seed) for seed, length in enumerate(lengths)]
    packed = PackedTokens.of(iter(samples))
    assert packed.length.tolist() == lengths
    assert packed.starts.tolist() == [sum(lengths[:row]) for row in range(len(lengths))]
    for one, other in zip(samples, packed, strict=True):
        assert one.truncated == other.truncated
        for name in ("input_ids", "segment_ids", "spans"):
            before, after = getattr(one, name), getattr(other, name)
            assert before.dtype == after.dtype
            assert np.array_equal(before, after)
