"""Every sample once an epoch, in an order that depends on seed and epoch alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.data.batching import BUCKET_BATCHES, ShuffledBatches, length_batches
from numpy.typing import NDArray

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=120)


def batches_of(indices: NDArray[np.int64], lengths: NDArray[Any], *, epoch: int = 0, **options: Any) -> list[list[int]]:
    sampler = ShuffledBatches(indices, lengths, **{"batch_size": 4, "seed": 0, "samples_per_shard": 8, **options})
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def subset(lengths: list[int], keep: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of a split inside a store, and the lengths of the whole store."""
    return np.arange(0, len(lengths), keep), np.array(lengths)


@given(
    lengths=LENGTHS,
    keep=st.integers(1, 3),
    batch_size=st.integers(1, 9),
    samples_per_shard=st.integers(1, 40),
    window_shards=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 1000),
)
def test_every_sample_comes_once_an_epoch(
    lengths: list[int],
    keep: int,
    batch_size: int,
    samples_per_shard: int,
    window_shards: int,
    seed: int,
    epoch: int,
) -> None:
    indices, all_lengths = subset(lengths, keep)
    options = {
        "batch_size": batch_size,
        "samples_per_shard": samples_per_shard,
        "window_shards": window_shards,
        "seed": seed,
    }
    batches = batches_of(indices, all_lengths, epoch=epoch, **options)
    assert sorted(itertools.chain.from_iterable(batches)) == indices.tolist()
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    assert batches == batches_of(indices, all_lengths, epoch=epoch, **options)


def test_seed_and_epoch_change_the_order() -> None:
    indices, lengths = subset(np.random.default_rng(0).integers(1, 99, 200).tolist(), 1)
    orders = [batches_of(indices, lengths, seed=seed, epoch=epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_an_epoch_does_not_depend_on_the_ones_before() -> None:
    """So that a resumed run goes on with the batches it would have had."""
    indices, lengths = subset(list(range(1, 100)), 1)
    sampler = ShuffledBatches(indices, lengths, batch_size=4, seed=3, samples_per_shard=8)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        seen = list(sampler)
    assert seen == batches_of(indices, lengths, seed=3, epoch=2)


def test_samples_stay_near_their_shard() -> None:
    """Few shards are open at a time: those of a window, and what is left of the window before."""
    indices, lengths = subset(np.random.default_rng(1).integers(1, 99, 4000).tolist(), 1)
    samples_per_shard, window_shards, batch_size = 50, 4, 4
    assert samples_per_shard * window_shards >= batch_size * BUCKET_BATCHES
    batches = batches_of(
        indices, lengths, samples_per_shard=samples_per_shard, window_shards=window_shards, batch_size=batch_size
    )
    shards = [index // samples_per_shard for batch in batches for index in batch]
    first = {shard: shards.index(shard) for shard in set(shards)}
    last = {shard: len(shards) - 1 - shards[::-1].index(shard) for shard in set(shards)}
    unfinished = [sum(first[s] <= step <= last[s] for s in first) for step in range(0, len(shards), batch_size)]
    assert max(unfinished) <= 2 * window_shards


def test_shards_and_the_samples_within_a_window_are_shuffled() -> None:
    indices, lengths = subset([7] * 1024, 1)
    windows, spreads = set(), []
    for seed in range(5):
        batches = batches_of(indices, lengths, seed=seed, samples_per_shard=64, window_shards=4)
        bucket = [index for batch in batches[:BUCKET_BATCHES] for index in batch]
        windows.add(tuple(sorted({index // 64 for index in bucket})))
        spreads.append(len({index % 64 for index in bucket}))
    assert len(windows) == 5
    assert all(len(window) == 4 for window in windows)
    # 64 of the 256 samples of a window, at random: not one shard's 64 in a row.
    assert max(spreads) < 60


def padded_tokens(batches: list[list[int]], lengths: NDArray[Any]) -> int:
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


def test_grouping_by_length_saves_padding_and_still_shuffles() -> None:
    indices, lengths = subset(np.random.default_rng(2).integers(1, 200, 800).tolist(), 1)
    batches = batches_of(indices, lengths, batch_size=8, samples_per_shard=100)
    shuffled = np.random.default_rng(3).permutation(800).reshape(-1, 8).tolist()
    assert padded_tokens(batches, lengths) < 1.15 * lengths.sum()
    assert padded_tokens(shuffled, lengths) > 1.6 * lengths.sum()
    means = [float(lengths[batch].mean()) for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_no_samples_are_no_batches() -> None:
    assert batches_of(np.empty(0, np.int64), np.array([1, 2])) == []


# ---------------------------------------------------------------------- batches of an extraction


@given(lengths=LENGTHS, max_tokens=st.integers(1, 500))
def test_padded_tokens_stay_below_the_limit(lengths: list[int], max_tokens: int) -> None:
    array = np.array(lengths)
    batches = length_batches(range(len(lengths)), array, None, max_tokens)
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or padded_tokens([batch], array) <= max_tokens
    for batch, following in itertools.pairwise(batches):
        # One more sample would not have fitted.
        assert padded_tokens([[*batch, following[0]]], array) > max_tokens


@given(lengths=LENGTHS, batch_size=st.integers(1, 9))
def test_a_fixed_batch_size_is_kept(lengths: list[int], batch_size: int) -> None:
    batches = length_batches(range(len(lengths)), np.array(lengths), batch_size, 1)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(lengths)))


@given(lengths=LENGTHS, order=st.randoms(use_true_random=False))
def test_the_longest_come_first_whatever_the_order(lengths: list[int], order: Any) -> None:
    array, indices = np.array(lengths), list(range(len(lengths)))
    expected = length_batches(indices, array, None, 256)
    order.shuffle(indices)
    assert length_batches(indices, array, None, 256) == expected
    flat = array[list(itertools.chain.from_iterable(expected))]
    assert np.all(np.diff(flat) <= 0)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_no_samples_are_no_extraction_batches(batch_size: int | None) -> None:
    assert length_batches([], np.array([4]), batch_size, 10) == []


@pytest.mark.parametrize("tokens", [1, 7, 8, 100, 1000])
def test_a_budget_of_tokens_is_as_many_batches_as_hold_them(tokens: int) -> None:
    """Counted batch by batch, over as many epochs as it takes, from the first whatever epoch is on."""
    lengths = np.arange(3, 23)
    batches = ShuffledBatches(np.arange(20), lengths, batch_size=3, seed=4, samples_per_shard=5)
    counted: list[int] = []
    for epoch in range(5):
        batches.set_epoch(epoch)
        counted += [int(lengths[batch].sum()) for batch in batches]
    steps = batches.steps_for(tokens)
    assert sum(counted[:steps]) >= tokens > sum(counted[: steps - 1])
