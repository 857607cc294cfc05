"""The bytes of one shard: Zarr v3 `sharding_indexed` with uncompressed, checksummed chunks, a file for every part.

A shard file is its non-empty chunks, each followed by a little-endian crc32c, then an index of
(offset, nbytes) uint64 pairs in C order of the chunk grid, then the index's own crc32c. Empty chunks
are left out and have all-ones entries. See the Zarr v3 specification, "Sharding codec".

Written here, staged tensors go to the file as they are, and a sample is read as one contiguous range;
zarr-python and tensorstore read the same files (tests/unit/kvcache/test_shard.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from .files import PartialFile

CRC_BYTES = 4
EMPTY = -1  # all ones in the file's uint64
NO_CHUNK = -1
"""In place of the checksum of a chunk that is not there."""


@dataclass(frozen=True)
class ShardLayout:
    """Geometry of one file: a grid of `samples` by `blocks` chunks, each `block` tokens of one sample."""

    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    block: int
    samples: int
    blocks: int

    @cached_property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @cached_property
    def record_bytes(self) -> int:
        """A chunk with its checksum."""
        return self.chunk_bytes + CRC_BYTES

    @cached_property
    def index_bytes(self) -> int:
        return self.samples * self.blocks * 16 + CRC_BYTES

    def blocks_of(self, length: int) -> int:
        """Token blocks that a sample of `length` tokens fills."""
        return -(-length // self.block)

    def index(self, lengths: Sequence[int], present: Sequence[bool]) -> NDArray[np.int64]:
        """(offset, nbytes) `[samples, blocks, 2]` of every chunk of a shard whose samples have these lengths; EMPTY
        where there is none, as for a sample that is not `present`."""
        index = np.full((self.samples, self.blocks, 2), EMPTY, dtype="<i8")
        first = 0
        for row, (length, there) in enumerate(zip(lengths, present, strict=True)):
            count = self.blocks_of(length)
            if there:
                index[row, :count, 0] = np.arange(first, first + count) * self.record_bytes
                index[row, :count, 1] = self.record_bytes
            first += count
        return index

    def shard_bytes(self, lengths: Sequence[int]) -> int:
        """Size of a shard file whose samples have these lengths."""
        return sum(map(self.blocks_of, lengths)) * self.record_bytes + self.index_bytes


def crc32c(data: NDArray[np.uint8], before: int = 0) -> int:
    """The Castagnoli checksum of contiguous bytes, or of these after others that have the checksum `before`."""
    return int(google_crc32c.extend(before, data))


class ShardFile:
    """Writes one shard, sample by sample and straight to its place: a file at each of `paths`, one a part of the store.

    `lengths` are the token counts of the shard's samples: with them every offset is known beforehand, so no
    sample waits in memory for another. Nothing is at its path before `finish`.
    """

    def __init__(
        self, paths: Sequence[Path], layouts: Sequence[ShardLayout], lengths: NDArray[np.integer[Any]]
    ) -> None:
        self.layouts = layouts
        self.lengths = [int(length) for length in lengths]
        grid = layouts[0]
        self._missing = set(range(len(self.lengths)))
        self._excluded: set[int] = set()
        self._first = np.cumsum([0] + [grid.blocks_of(length) for length in self.lengths]).tolist()
        self._checksums = np.full((grid.samples, len(layouts), grid.blocks), NO_CHUNK, dtype=np.int64)
        self._files: list[PartialFile] = []
        try:
            for path in paths:
                self._files.append(PartialFile(path))
        except BaseException:
            self.discard()
            raise

    @property
    def remaining(self) -> int:
        """Samples that have not come yet."""
        return len(self._missing)

    @property
    def nbytes(self) -> int:
        """Size of the finished files."""
        return sum(layout.shard_bytes(self.lengths) for layout in self.layouts)

    def add(self, row: int, records: Sequence[NDArray[np.uint8]]) -> None:
        """Write sample `row`: for every part its token blocks as `[blocks, record_bytes]`, which are changed in place
        (every chunk gets its checksum).

        Raises ValueError for records of another number or size.
        """
        blocks = self.layouts[0].blocks_of(self.lengths[row])
        for layout, file, part, checksums in zip(self.layouts, self._files, records, self._checksums[row], strict=True):
            expected = (blocks, layout.record_bytes)
            if part.shape != expected:
                raise ValueError(f"records that do not fit the shard: expected {expected}, found {part.shape}")
            for blk, record in enumerate(part):
                checksums[blk] = crc32c(record[: layout.chunk_bytes])
                record[layout.chunk_bytes :] = _le32(int(checksums[blk]))
            file.write_at(part.reshape(-1).data, self._first[row] * layout.record_bytes)
        self._missing.discard(row)

    def exclude(self, row: int) -> None:
        """Leave sample `row` out for good: its chunks are empty ones, without checksums."""
        self._excluded.add(row)
        self._missing.discard(row)

    def finish(self) -> NDArray[np.int64]:
        """Write the indices and put the files in place. Returns the checksums `[samples, parts, blocks]` of its chunks;
        NO_CHUNK where there is none."""
        present = [row not in self._excluded for row in range(len(self.lengths))]
        for layout, file in zip(self.layouts, self._files, strict=True):
            tail = layout.index(self.lengths, present).reshape(-1).view(np.uint8)
            offset = layout.shard_bytes(self.lengths) - layout.index_bytes
            file.write_at(tail.tobytes() + _le32(crc32c(tail)).tobytes(), offset)
            file.commit()
        return self._checksums

    def discard(self) -> None:
        """Give up: nothing is left on the disk that was not in place before."""
        for file in self._files:
            file.discard()


def read_index(data: NDArray[np.uint8], layout: ShardLayout) -> NDArray[np.int64]:
    """(offset, nbytes) `[samples, blocks, 2]` of every chunk in a shard's bytes; (-1, -1) for an empty chunk.

    Raises ValueError where the bytes are cut short or the index fails its checksum.
    """
    if len(data) < layout.index_bytes:
        raise ValueError(f"{len(data)} bytes cannot hold an index of {layout.index_bytes}")
    tail = data[len(data) - layout.index_bytes :]
    if _le32(crc32c(tail[:-CRC_BYTES])).tobytes() != tail[-CRC_BYTES:].tobytes():
        raise ValueError("the shard's index fails its checksum")
    return tail[:-CRC_BYTES].view("<i8").reshape(layout.samples, layout.blocks, 2)


def sample_starts(index: NDArray[np.int64], layout: ShardLayout) -> list[int]:
    """Where in a file the chunks of every sample begin; -1 for a sample that has none, or whose are not one range."""
    offsets, sizes = index[..., 0], index[..., 1]
    in_order = offsets == offsets[:, :1] + np.arange(layout.blocks) * layout.record_bytes
    whole = (in_order & (sizes == layout.record_bytes)) | (offsets == EMPTY)
    return np.where(whole.all(axis=1) & (offsets[:, 0] >= 0), offsets[:, 0], -1).tolist()


def require_checksums(records: NDArray[np.uint8], layout: ShardLayout, checksums: Sequence[int]) -> None:
    """Raise ValueError where a sample's records `[blocks, record_bytes]` of one part are not the bytes that were
    written for this sample."""
    for blk, (record, expected) in enumerate(zip(records, checksums, strict=True)):
        if crc32c(record[: layout.chunk_bytes]) != expected:
            raise ValueError(f"token block {blk} fails its checksum")


def _le32(value: int) -> NDArray[np.uint8]:
    return np.frombuffer(value.to_bytes(4, "little"), dtype=np.uint8)
