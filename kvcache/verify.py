"""Read a whole store against its checksums, and say what is damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import StoreError
from .shard import CRC_BYTES, EMPTY, crc32c, read_index
from .store import KVStore


@dataclass(frozen=True)
class Damage:
    """One shard that is not what was written; `samples` are the positions that cannot be trusted."""

    shard: int
    samples: tuple[int, ...]
    problem: str

    def __str__(self) -> str:
        """On one line; runs of samples as `first-last`."""
        runs = np.split(self.samples, np.flatnonzero(np.diff(self.samples) != 1) + 1)
        words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
        return f"shard {self.shard}, samples {', '.join(words)}: {self.problem}"


def verify_shards(store: KVStore) -> Iterator[Damage | None]:
    """Every shard in turn, read by a few threads: its first damage, or None for a sound one.

    Shards that were never finished are damage too.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="kvpipe-verify") as threads:
        yield from threads.map(lambda shard: _verify(store, shard), range(store.num_shards))


def require_sound(store: KVStore, damages: Sequence[Damage]) -> None:
    """Raise StoreError where any shard is damaged."""
    if damages:
        raise StoreError(
            f"{store.path} is damaged",
            expected=f"{store.num_shards} sound shards",
            found=f"{len(damages)} damaged: {', '.join(str(damage.shard) for damage in damages)}",
            remedy="`kvpipe repair` writes these anew, given the teacher",
        )


def require_side_arrays(store: KVStore) -> None:
    """Raise StoreError for a damaged array beside the KV. (Metadata is checked when a store is opened.)"""
    for name in store.side_arrays:
        store.read_side_array(name)


def _verify(store: KVStore, shard: int) -> Damage | None:
    everything = tuple(store.shard_samples(shard))
    try:
        checksums = store.shard_checksums(shard)
        data = np.fromfile(store.shard_path(shard), np.uint8)
        found = read_index(data, store.layout)
    except (StoreError, ValueError, OSError) as error:
        return Damage(shard, everything, str(error))
    lengths = [int(store.length[sample]) for sample in everything]
    present = [bool(row.any()) for row in checksums[: len(lengths)]]
    expected = store.layout.index(lengths, present)
    if not np.array_equal(found, expected) or len(data) != store.layout.shard_bytes(lengths):
        return Damage(shard, everything, "the index or the size is not that of its samples")
    bad = [sample for row, sample in enumerate(everything) if not _sound(store, data, found[row], checksums[row])]
    return Damage(shard, tuple(bad), "token blocks fail their checksums") if bad else None


def _sound(store: KVStore, data: NDArray[np.uint8], entries: NDArray[np.int64], checksums: NDArray[np.uint32]) -> bool:
    for (offset, nbytes), checksum in zip(entries.tolist(), checksums.tolist(), strict=True):
        if offset == EMPTY:
            continue
        chunk, own = data[offset : offset + nbytes - CRC_BYTES], data[offset + nbytes - CRC_BYTES : offset + nbytes]
        if crc32c(chunk) != checksum or int.from_bytes(own.tobytes(), "little") != checksum:
            return False
    return True
