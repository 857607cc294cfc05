"""Read a whole store against its checksums, and say what is damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO

import numpy as np
from numpy.typing import NDArray

from .errors import StoreError
from .integrity import PIECE_BYTES
from .shard import CRC_BYTES, NO_CHUNK, ShardLayout, crc32c, read_index
from .store import KVStore


@dataclass(frozen=True)
class Damage:
    """One shard that is not what it should be; `samples` are the positions that cannot be trusted."""

    shard: int
    samples: tuple[int, ...]
    problem: str
    written: bool = True

    def __str__(self) -> str:
        return f"shard {self.shard}, samples {_ranges(self.samples)}: {self.problem}"


def verify_shards(store: KVStore) -> Iterator[Damage | None]:
    """Every shard in turn, read by a few threads: its first damage, or None for a sound one.

    Shards that were never finished are damage that was not `written`. Raises StoreError where the samples' lengths are
    damaged.
    """
    lengths = store.kv_length.tolist()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="kvpipe-verify") as threads:
        yield from threads.map(lambda shard: _verify(store, lengths, shard), range(store.num_shards))


def describe(damages: Sequence[Damage]) -> list[str]:
    """A line for every damaged shard, and one for all that are not written yet."""
    unwritten = [damage.shard for damage in damages if not damage.written]
    lines = [str(damage) for damage in damages if damage.written]
    return lines + ([f"not written yet: shards {_ranges(unwritten)}"] if unwritten else [])


def require_sound(store: KVStore, damages: Sequence[Damage]) -> None:
    """Raise StoreError where any shard is damaged, or not written yet."""
    damaged = [damage.shard for damage in damages if damage.written]
    if damaged:
        raise StoreError(
            f"{store.path} is damaged",
            expected=f"{store.num_shards} sound shards",
            found=f"{len(damaged)} damaged: {_ranges(damaged)}",
            remedy="`kvpipe repair` writes these anew, given the teacher",
        )
    store.require_complete()


def require_side_arrays(store: KVStore) -> None:
    """Raise StoreError for a damaged array beside the KV. (Metadata is checked when a store is opened.)"""
    for name in store.side_arrays:
        store.read_side_array(name)


def _ranges(numbers: Sequence[int]) -> str:
    """Runs as `first-last`."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _verify(store: KVStore, all_lengths: Sequence[int], shard: int) -> Damage | None:
    everything = tuple(store.shard_samples(shard))
    lengths, layouts = [all_lengths[sample] for sample in everything], list(store.layouts.values())
    if not store.ledger.path(shard).exists():
        return Damage(shard, everything, "not written yet", written=False)
    try:
        checksums = store.ledger.checksums(shard)[: len(lengths)]
    except StoreError:
        return Damage(shard, everything, "its ledger entry is damaged")
    try:
        if not all(path.is_file() for path in store.shard_paths(shard)):
            raise FileNotFoundError("its file is missing")
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb", buffering=0)) for path in store.shard_paths(shard)]
            for file, layout in zip(files, layouts, strict=True):
                _require_index(file, layout, lengths, checksums[:, 0])
            bad = set[int]()
            for part, (file, layout) in enumerate(zip(files, layouts, strict=True)):
                bad |= _damaged_rows(file, layout, lengths, checksums[:, part])
    except (ValueError, OSError) as error:
        return Damage(shard, everything, str(error))
    return Damage(shard, tuple(everything[row] for row in sorted(bad)), "chunks fail their checksums") if bad else None


def _require_index(file: FileIO, layout: ShardLayout, lengths: Sequence[int], checksums: NDArray[np.int64]) -> None:
    """Raise ValueError for a shard whose size or index is not that of its samples."""
    expected, found = layout.shard_bytes(lengths), os.fstat(file.fileno()).st_size
    if found != expected:
        raise ValueError(f"{found} bytes instead of {expected}")
    file.seek(expected - layout.index_bytes)
    index = read_index(np.frombuffer(file.read(layout.index_bytes), np.uint8), layout)
    if not np.array_equal(index, layout.index(lengths, (checksums[:, 0] != NO_CHUNK).tolist())):
        raise ValueError("the index is not that of its samples")


def _damaged_rows(file: FileIO, layout: ShardLayout, lengths: Sequence[int], checksums: NDArray[np.int64]) -> set[int]:
    """Rows with a chunk in this file that is not what the ledger recorded, or whose own checksum is not."""
    rows = [row for row, length in enumerate(lengths) for _ in range(layout.blocks_of(length))]
    expected = np.concatenate([checksums[row, : layout.blocks_of(length)] for row, length in enumerate(lengths)])
    # Pieces into one buffer: fresh pages for a whole shard cost more than the checksums.
    piece = max(1, PIECE_BYTES // layout.record_bytes)
    buffer = np.empty((piece, layout.record_bytes), np.uint8)
    bad: set[int] = set()
    file.seek(0)
    for start in range(0, len(rows), piece):
        wanted = expected[start : start + piece]
        records = buffer[: len(wanted)]
        _read_exactly(file, records)
        own = records[:, -CRC_BYTES:].copy().view("<u4")[:, 0]
        found = np.array([crc32c(record[:-CRC_BYTES]) for record in records])
        # A sample that was left out has no chunks: what lies in its place means nothing.
        damaged = ((found != wanted) | (found != own)) & (wanted != NO_CHUNK)
        bad |= {rows[start + int(i)] for i in np.flatnonzero(damaged)}
    return bad


def _read_exactly(file: FileIO, into: NDArray[np.uint8]) -> None:
    view = memoryview(into.reshape(-1).data)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise ValueError(f"the file ends {len(view)} bytes early")
        view = view[count:]
