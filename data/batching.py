"""Which samples go together, and in which order: index arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

BUCKET_BATCHES = 16
"""Batches sorted by length together: less padding, still shuffled."""


def length_batches(
    indices: Sequence[int], lengths: NDArray[np.integer[Any]], batch_size: int | None, max_tokens: int
) -> list[list[int]]:
    """Cut samples, longest first, into batches of `batch_size`, or of at most `max_tokens` padded tokens.

    Depends on the lengths alone, so that a repeated extraction runs the very same batches.
    """
    ordered = sorted(indices, key=lambda i: (-int(lengths[i]), i))
    batches: list[list[int]] = []
    start = 0
    while start < len(ordered):
        size = batch_size or max(1, max_tokens // int(lengths[ordered[start]]))
        batches.append(ordered[start : start + size])
        start += size
    return batches


class ShuffledBatches(Sampler[list[int]]):
    """Batches of one epoch: shards in a shuffled order, samples shuffled within a window of shards and
    grouped by length.

    The order is a function of (seed, epoch) alone, so that arms that share a seed see the same batches and
    a resumed run goes on with the right one. Every sample comes once an epoch; the last batch may be short.
    """

    def __init__(
        self,
        indices: NDArray[np.int64],
        lengths: NDArray[np.integer[Any]],
        batch_size: int,
        seed: int,
        samples_per_shard: int,
        window_shards: int = 16,
    ) -> None:
        self.batch_size = batch_size
        self._indices, self._lengths, self._seed, self._epoch = indices, lengths, seed, 0
        self._samples_per_shard, self._window_shards = samples_per_shard, window_shards

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._indices) // self.batch_size)

    def steps_for(self, tokens: int) -> int:
        """Batches, over as many epochs as it takes, until they hold at least `tokens`."""
        seen = steps = 0
        for epoch in count():
            for batch in self._batches(epoch):
                if seen >= tokens:
                    return steps
                seen, steps = seen + int(self._lengths[batch].sum()), steps + 1
        raise AssertionError

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(self._epoch)

    def _batches(self, epoch: int) -> Iterator[list[int]]:
        rng = np.random.default_rng([self._seed, epoch])
        bucket_size = self.batch_size * BUCKET_BATCHES
        pending = np.empty(0, np.int64)
        for window in self._windows(rng):
            pending = np.concatenate([pending, rng.permutation(window)])
            cut = len(pending) - len(pending) % bucket_size
            for start in range(0, cut, bucket_size):
                yield from self._bucket(pending[start : start + bucket_size], rng)
            pending = pending[cut:]
        yield from self._bucket(pending, rng)

    def _windows(self, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        shard_of = self._indices // self._samples_per_shard
        shards = rng.permutation(np.unique(shard_of))
        for start in range(0, len(shards), self._window_shards):
            yield self._indices[np.isin(shard_of, shards[start : start + self._window_shards])]

    def _bucket(self, bucket: NDArray[np.int64], rng: np.random.Generator) -> list[list[int]]:
        ordered = bucket[np.argsort(self._lengths[bucket], kind="stable")]
        batches = [ordered[i : i + self.batch_size].tolist() for i in range(0, len(ordered), self.batch_size)]
        if batches and len(batches[-1]) < self.batch_size:
            last = batches.pop()
            return [batches[i] for i in rng.permutation(len(batches))] + [last]
        return [batches[i] for i in rng.permutation(len(batches))]
