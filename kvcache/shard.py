"""The bytes of one shard: Zarr v3 `sharding_indexed` with uncompressed, checksummed chunks.

A shard file is its non-empty chunks, each followed by a little-endian crc32c, then an index of
(offset, nbytes) uint64 pairs in C order of the chunk grid, then the index's own crc32c. Empty chunks
are left out and have all-ones entries. See the Zarr v3 specification, "Sharding codec".

Writing it here costs one copy from the staged tensors to the file's bytes, and lets a sample be read
as one contiguous range; zarr-python and tensorstore read the same files (tests/unit/kvcache/test_shard.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from .files import PartialFile

CRC_BYTES = 4
EMPTY = -1  # all ones in the file's uint64


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


def crc32c(data: NDArray[np.uint8]) -> int:
    """The Castagnoli checksum of contiguous bytes."""
    return int(google_crc32c.value(data))


class ShardFile:
    """Writes one shard to `path`, sample by sample and straight to its place in the file.

    `lengths` are the token counts of the shard's samples: with them every offset is known beforehand, so no
    sample waits in memory for another. Tokens past a sample's length become zero. Nothing is at `path` before `finish`.
    """

    def __init__(self, path: Path, layout: ShardLayout, lengths: NDArray[np.integer[Any]]) -> None:
        self.layout = layout
        self.lengths = [int(length) for length in lengths]
        self._missing = set(range(len(self.lengths)))
        self._first = np.cumsum([0] + [layout.blocks_of(length) for length in self.lengths]).tolist()
        self._checksums = np.zeros((layout.samples, layout.blocks), dtype=np.uint32)
        self._file = PartialFile(path)

    @property
    def remaining(self) -> int:
        """Samples that have not come yet."""
        return len(self._missing)

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return int(self._first[-1]) * self.layout.record_bytes + self.layout.index_bytes

    def add(self, row: int, kv: NDArray[Any]) -> None:
        """Write sample `row` of the shard: `[L, 2, H, T, D]`, T >= its length.

        Raises ValueError for KV of another shape or dtype: NumPy would broadcast and cast it without a word.
        """
        length, layout = self.lengths[row], self.layout
        self._check(length, kv)
        records = np.empty((layout.blocks_of(length), layout.record_bytes), np.uint8)
        for blk, record in enumerate(records):
            start = blk * layout.block
            filled = min(layout.block, length - start)
            data = record[: layout.chunk_bytes]
            chunk = data.view(layout.dtype).reshape(layout.chunk_shape)[:, :, 0]
            chunk[:, :, :, :filled] = kv[:, :, :, start : start + filled]
            chunk[:, :, :, filled:] = 0
            self._checksums[row, blk] = crc32c(data)
            record[layout.chunk_bytes :] = _le32(int(self._checksums[row, blk]))
        self._file.write_at(records.reshape(-1).data, self._first[row] * layout.record_bytes)
        self._missing.discard(row)

    def _check(self, length: int, kv: NDArray[Any]) -> None:
        layout = self.layout
        expected = (layout.num_layers, 2, layout.num_kv_heads, layout.head_dim, layout.dtype)
        if kv.ndim != 5 or (*kv.shape[:3], kv.shape[4], kv.dtype) != expected or kv.shape[3] < length:
            raise ValueError(
                f"KV that does not fit the store: expected [L, 2, H, T, D] = [{layout.num_layers}, 2, "
                f"{layout.num_kv_heads}, >={length}, {layout.head_dim}] {layout.dtype.name}, "
                f"found {list(kv.shape)} {kv.dtype.name}"
            )

    def finish(self) -> NDArray[np.uint32]:
        """Write the index and put the file in place. Returns the checksums `[samples, blocks]` of its chunks,
        0 where a chunk is empty."""
        layout = self.layout
        index = np.full((layout.samples, layout.blocks, 2), EMPTY, dtype="<i8")
        for row, (first, last) in enumerate(pairwise(self._first)):
            index[row, : last - first, 0] = np.arange(first, last) * layout.record_bytes
            index[row, : last - first, 1] = layout.record_bytes
        tail = index.reshape(-1).view(np.uint8)
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
    checksums: NDArray[np.uint32],
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
