"""The bytes of one shard: Zarr v3 `sharding_indexed` with uncompressed, checksummed chunks.

A shard file is its non-empty chunks, each followed by a little-endian crc32c, then an index of
(offset, nbytes) uint64 pairs in C order of the chunk grid, then the index's own crc32c. Empty chunks
are left out and have all-ones entries. See the Zarr v3 specification, "Sharding codec".

Writing it here costs one copy from the model's tensors to the file's bytes, and lets a sample be read
as one contiguous range; zarr-python and tensorstore read the same files (tests/unit/kvcache/test_shard.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

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


class ShardBuilder:
    """Fills one shard in memory, in the byte order of its file.

    `lengths` are the token counts of the shard's samples; tokens past a sample's length stay zero.
    """

    def __init__(self, layout: ShardLayout, lengths: NDArray[np.integer[Any]]) -> None:
        self.layout = layout
        self.lengths = [int(length) for length in lengths]
        self._missing = set(range(len(self.lengths)))
        counts = [layout.blocks_of(length) for length in self.lengths]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        data_bytes = int(self._first[-1]) * layout.record_bytes
        self._bytes = np.zeros(data_bytes + layout.index_bytes, dtype=np.uint8)
        self._records = self._bytes[:data_bytes].reshape(-1, layout.record_bytes)

    @property
    def remaining(self) -> int:
        """Samples that have not come yet."""
        return len(self._missing)

    def add(self, row: int, layers: list[tuple[NDArray[Any], NDArray[Any]]]) -> None:
        """Copy in sample `row` of the shard: per layer its key and value `[H, T, D]`, T >= its length.

        Raises ValueError for KV of another shape or dtype: NumPy would broadcast and cast it without a word.
        """
        length, block = self.lengths[row], self.layout.block
        self._check(length, layers)
        for blk in range(self.layout.blocks_of(length)):
            record = self._records[self._first[row] + blk, : self.layout.chunk_bytes]
            chunk = record.view(self.layout.dtype).reshape(self.layout.chunk_shape)
            start, stop = blk * block, min(length, (blk + 1) * block)
            for layer, pair in enumerate(layers):
                for kv, tensor in enumerate(pair):
                    chunk[layer, kv, 0, :, : stop - start] = tensor[:, start:stop]
        self._missing.discard(row)

    def _check(self, length: int, layers: list[tuple[NDArray[Any], NDArray[Any]]]) -> None:
        layout = self.layout
        found = {(len(t), t.shape[1] >= length, *t.shape[2:], t.dtype.str) for pair in layers for t in pair}
        expected = (layout.num_kv_heads, True, layout.head_dim, layout.dtype.str)
        if len(layers) != layout.num_layers or found != {expected}:
            shapes = [(t.shape, t.dtype.name) for pair in layers for t in pair]
            raise ValueError(
                f"KV that does not fit the store: expected {layout.num_layers} layers of [H, T, D] = "
                f"[{layout.num_kv_heads}, >={length}, {layout.head_dim}] {layout.dtype.name}, found {shapes}"
            )

    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """The file's bytes, and the checksums `[samples, blocks]` of its chunks (0 where a chunk is empty)."""
        layout = self.layout
        index = np.full((layout.samples, layout.blocks, 2), EMPTY, dtype="<i8")
        checksums = np.zeros((layout.samples, layout.blocks), dtype=np.uint32)
        for row in range(len(self.lengths)):
            for blk, record in enumerate(range(self._first[row], self._first[row + 1])):
                checksum = crc32c(self._records[record, : layout.chunk_bytes])
                self._records[record, layout.chunk_bytes :] = _le32(checksum)
                checksums[row, blk] = checksum
                index[row, blk] = record * layout.record_bytes, layout.record_bytes
        tail = self._bytes[len(self._bytes) - layout.index_bytes :]
        tail[:-CRC_BYTES] = index.reshape(-1).view(np.uint8)
        tail[-CRC_BYTES:] = _le32(crc32c(tail[:-CRC_BYTES]))
        return self._bytes, checksums


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
