"""The bytes of one shard: Zarr v3 `sharding_indexed` with uncompressed, checksummed chunks.

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
    """Geometry of a shard: `samples` of at most `blocks` token blocks, chunks `[L, 2, 1, H, block, D]`."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block: int
    samples: int
    blocks: int
    dtype: np.dtype[Any]

    @cached_property
    def chunk_shape(self) -> tuple[int, int, int, int, int, int]:
        return (self.num_layers, 2, 1, self.num_kv_heads, self.block, self.head_dim)

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


def crc32c(data: NDArray[np.uint8]) -> int:
    """The Castagnoli checksum of contiguous bytes."""
    return int(google_crc32c.value(data))


class ShardFile:
    """Writes one shard to `path`, sample by sample and straight to its place in the file.

    `lengths` are the token counts of the shard's samples: with them every offset is known beforehand, so no
    sample waits in memory for another. Nothing is at `path` before `finish`.
    """

    def __init__(self, path: Path, layout: ShardLayout, lengths: NDArray[np.integer[Any]]) -> None:
        self.layout = layout
        self.lengths = [int(length) for length in lengths]
        self._missing = set(range(len(self.lengths)))
        self._excluded: set[int] = set()
        self._first = np.cumsum([0] + [layout.blocks_of(length) for length in self.lengths]).tolist()
        self._checksums = np.full((layout.samples, layout.blocks), NO_CHUNK, dtype=np.int64)
        self._file = PartialFile(path)

    @property
    def remaining(self) -> int:
        """Samples that have not come yet."""
        return len(self._missing)

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return self.layout.shard_bytes(self.lengths)

    def add(self, row: int, records: NDArray[np.uint8]) -> None:
        """Write sample `row`: its token blocks as `[blocks, record_bytes]`, which are changed in place (tokens past
        the sample's end become zero, and every chunk gets its checksum).

        Raises ValueError for records of another number or size.
        """
        length, layout = self.lengths[row], self.layout
        expected = (layout.blocks_of(length), layout.record_bytes)
        if records.shape != expected:
            raise ValueError(f"records that do not fit the shard: expected {expected}, found {records.shape}")
        if past_end := -length % layout.block:
            last = records[-1, : layout.chunk_bytes].view(layout.dtype).reshape(layout.chunk_shape)
            last[..., layout.block - past_end :, :] = 0
        for blk, record in enumerate(records):
            checksum = crc32c(record[: layout.chunk_bytes])
            record[layout.chunk_bytes :] = _le32(checksum)
            self._checksums[row, blk] = checksum
        self._file.write_at(records.reshape(-1).data, self._first[row] * layout.record_bytes)
        self._missing.discard(row)

    def exclude(self, row: int) -> None:
        """Leave sample `row` out for good: its chunks are empty ones, without checksums."""
        self._excluded.add(row)
        self._missing.discard(row)

    def finish(self) -> NDArray[np.int64]:
        """Write the index and put the file in place. Returns the checksums `[samples, blocks]` of its chunks,
        NO_CHUNK where there is none."""
        layout = self.layout
        present = [row not in self._excluded for row in range(len(self.lengths))]
        tail = layout.index(self.lengths, present).reshape(-1).view(np.uint8)
        self._file.write_at(tail.tobytes() + _le32(crc32c(tail)).tobytes(), self.nbytes - layout.index_bytes)
        self._file.commit()
        return self._checksums

    def discard(self) -> None:
        """Give up: nothing is left on the disk."""
        self._file.discard()


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


def read_sample(
    data: NDArray[np.uint8],
    layout: ShardLayout,
    entries: NDArray[np.int64],
    checksums: NDArray[np.int64],
    out: NDArray[Any],
) -> None:
    """Copy one sample's chunks into `out` `[L, 2, H, T, D]`, T a multiple of the block.

    `entries` `[blocks, 2]` come from the index, `checksums` `[blocks]` from the ledger. Raises ValueError
    where a chunk is missing, misplaced, or not the bytes that were written for this sample.
    """
    for blk, ((offset, nbytes), expected) in enumerate(zip(entries.tolist(), checksums.tolist(), strict=True)):
        if nbytes != layout.record_bytes or not 0 <= offset <= len(data) - nbytes:
            raise ValueError(f"token block {blk} is missing or cut short")
        record = data[offset : offset + layout.chunk_bytes]
        if crc32c(record) != expected:
            raise ValueError(f"token block {blk} fails its checksum")
        chunk = record.view(layout.dtype).reshape(layout.chunk_shape)
        out[:, :, :, blk * layout.block : (blk + 1) * layout.block] = chunk[:, :, 0]


def _le32(value: int) -> NDArray[np.uint8]:
    return np.frombuffer(value.to_bytes(4, "little"), dtype=np.uint8)
