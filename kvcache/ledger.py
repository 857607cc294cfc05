"""The ledger: which shards are whole, and the checksum of every chunk in them. An array cannot tell: Zarr reads missing
chunks as zeros."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import StoreError
from .files import write_atomic
from .shard import CRC_BYTES, NO_CHUNK, ShardLayout, crc32c


class Ledger:
    """The array `ledger` of a store: `[B, 1 + parts * blocks]` int64, a chunk a shard.

    A sample's row is its own number, then, part by part, the crc32c of its token blocks, NO_CHUNK past its end: a part
    can be checked without reading the others. Numbers count from one, for Zarr reads a missing entry as zeros; that of
    a sample whose KV was left out for good is negative. So an entry in another's place is seen.
    """

    def __init__(self, folder: Path, layout: ShardLayout, lengths: NDArray[np.int32], parts: int) -> None:
        self._folder = folder
        self._layout = layout
        self._lengths = lengths
        self._parts = parts

    @staticmethod
    def array(
        num_samples: int, samples: int, blocks: int, parts: int
    ) -> tuple[tuple[int, int], tuple[int, int], np.dtype[Any]]:
        """Shape, chunks and dtype of the array of a store of some parts, whose shards hold `samples` of at most
        `blocks` blocks."""
        return (num_samples, 1 + parts * blocks), (samples, 1 + parts * blocks), np.dtype(np.int64)

    def path(self, shard: int) -> Path:
        """The file of a shard's entry."""
        return self._folder / "c" / str(shard) / "0"

    @property
    def entry_bytes(self) -> int:
        """Size of a shard's file."""
        return math.prod(self._shape) * 8 + CRC_BYTES

    def record(self, shard: int, checksums: NDArray[np.int64]) -> None:
        """Enter a finished shard: only now does it count. `checksums` are `[samples, parts, blocks]`."""
        entry = np.zeros(self._shape, "<i8")
        entry[:, 1:] = checksums.reshape(len(entry), -1)
        numbers = self._numbers(shard)
        entry[: len(numbers), 0] = np.where(checksums[: len(numbers), 0, 0] == NO_CHUNK, -numbers, numbers)
        data = entry.reshape(-1).view(np.uint8)
        write_atomic(self.path(shard), data.tobytes() + crc32c(data).to_bytes(CRC_BYTES, "little"))

    def numbers(self, shard: int) -> NDArray[np.int64] | None:
        """The numbers of a shard's samples, negative for those that were left out; None where it has no valid entry."""
        entry = self._entry(shard)
        # A copy: of the rest, which is far larger, nothing is kept.
        return None if entry is None else entry[: len(self._numbers(shard)), 0].copy()

    def checksums(self, shard: int) -> NDArray[np.int64]:
        """Checksums `[samples, parts, blocks]` of a shard's chunks. Raises StoreError for an unfinished shard."""
        entry = self._entry(shard)
        if entry is None:
            raise StoreError(
                f"shard {shard} of {self._folder.parent} is not in the ledger, or its entry is damaged",
                expected=f"valid checksums at {self.path(shard)}",
                found="none",
                remedy="Run the same `kvpipe extract` again: it writes the missing shards",
            )
        return self._checksums(entry)

    def _entry(self, shard: int) -> NDArray[np.int64] | None:
        """What is recorded of a shard; None where nothing is, or what belongs to another shard."""
        path = self.path(shard)
        # Looked at before it is read: the file may be anything.
        if not path.is_file() or path.stat().st_size != self.entry_bytes:
            return None
        data = np.fromfile(path, np.uint8)
        content, checksum = data[:-CRC_BYTES], data[-CRC_BYTES:]
        if crc32c(content).to_bytes(CRC_BYTES, "little") != checksum.tobytes():
            return None
        entry = content.view("<i8").reshape(self._shape)
        return entry if self._belongs_to(entry, shard) else None

    def _belongs_to(self, entry: NDArray[np.int64], shard: int) -> bool:
        """Whether the rows are of the shard's samples, with all chunks of those that were not left out."""
        numbers = self._numbers(shard)
        blocks = np.zeros(len(entry), np.int64)
        blocks[: len(numbers)] = -(-self._lengths[numbers - 1] // self._layout.block)
        blocks[entry[:, 0] < 0] = 0
        own = np.zeros(len(entry), np.int64)
        own[: len(numbers)] = numbers
        found = (self._checksums(entry) != NO_CHUNK).sum(axis=2)
        return bool(np.all(np.abs(entry[:, 0]) == own) and np.all(found == blocks[:, None]))

    def _checksums(self, entry: NDArray[np.int64]) -> NDArray[np.int64]:
        return entry[:, 1:].reshape(len(entry), self._parts, self._layout.blocks)

    @property
    def _shape(self) -> tuple[int, int]:
        """Of an entry."""
        return self._layout.samples, 1 + self._parts * self._layout.blocks

    def _numbers(self, shard: int) -> NDArray[np.int64]:
        """The numbers of a shard's samples, counted from one."""
        start = shard * self._layout.samples
        return np.arange(start, min(start + self._layout.samples, len(self._lengths)), dtype=np.int64) + 1
