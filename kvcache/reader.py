"""Read samples back: one contiguous range a sample, every checksum compared with the ledger."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from .errors import StoreError
from .layout import KV, STORAGE_DTYPES, from_storage, to_storage
from .recycled import RecycledMemory
from .shard import ShardLayout, read_index, require_checksums, sample_starts
from .store import KVStore

CACHED_BYTES = 2**22
"""Of what is read at once: by the time it is checked and copied on, it has not left the processor's cache."""

OPEN_FILES = 128
"""File handles kept: shards are visited a few at a time."""


@dataclass(frozen=True)
class _OpenShard:
    """For every part a file, and where each sample begins in it; and the ledger's checksums of a sample's blocks."""

    descriptors: list[int]
    starts: list[list[int]]
    checksums: list[list[int]]

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


class KVReader:
    """Random access to the samples of a complete store.

    Opens a shard at first use. Nothing reaches the caller that does not match the ledger: damage raises
    StoreError naming the shard and the sample.
    """

    def __init__(self, store: KVStore) -> None:
        self._shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._memory = RecycledMemory()
        self._buffers = [np.empty(0, np.uint8) for _ in store.layouts]
        self._layouts = list(store.layouts.values())
        self._shapes = [part.content_shape for part in store.parts.values()]
        self._open_limit = max(1, OPEN_FILES // len(store.layouts))
        store.require_complete()
        self.store = store

    def read(self, indices: Sequence[int], num_tokens: int | None = None) -> KV:
        """KV `[L, 2, B, H, T, D]` of the samples at `indices`, in the store's logical dtype.

        T is `num_tokens`, by default the most that a sample keeps; tokens past a sample's last are zero.
        """
        return self.read_with_positions(indices, num_tokens)[0]

    def read_with_positions(
        self, indices: Sequence[int], num_tokens: int | None = None
    ) -> tuple[KV, Int[Tensor, "B T"] | None]:
        """As `read`, and of a store that evicts tokens the position in its sample of every one that was kept, -1 past
        the last; else None."""
        geometry, grid = self.store.geometry, self.store.layout
        lengths = [int(self.store.kv_length[index]) for index in indices]
        num_tokens = max(lengths) if num_tokens is None else num_tokens
        blocks = [grid.blocks_of(min(length, num_tokens)) for length in lengths]
        positions = torch.full((len(indices), num_tokens), -1)
        sample = (len(blocks), geometry.num_kv_heads, grid.blocks_of(num_tokens), grid.block, geometry.head_dim)
        cut = self._memory.empty((geometry.num_layers, 2, *sample), np.dtype(STORAGE_DTYPES[geometry.dtype]))
        out = cut.reshape(*cut.shape[:4], -1, geometry.head_dim)
        for rows in self._groups(blocks):
            parts = self._read_parts([indices[row] for row in rows], [blocks[row] for row in rows])
            stored = parts.pop().flatten() if self.store.evicts else None
            # NumPy's small copies cost half of what torch's do.
            chunks, first = to_storage(self.store.codec.decode(parts, self.store.dtype)), 0
            for row in rows:
                last, length = first + blocks[row], min(lengths[row], num_tokens)
                cut[:, :, row, :, : blocks[row]] = chunks[first:last].transpose(1, 2, 3, 0, 4, 5)
                out[:, :, row, :, length:] = 0
                if stored is not None:
                    positions[row, :length] = stored[first * grid.block :][:length]
                first = last
        kv = from_storage(out, geometry.dtype)[..., :num_tokens, :]
        return kv, positions if self.store.evicts else None

    def _groups(self, blocks: Sequence[int]) -> Iterator[range]:
        """Rows whose token blocks are read and decoded together, few enough to be in the processor's cache between."""
        most, first, total = CACHED_BYTES // sum(layout.record_bytes for layout in self._layouts), 0, 0
        for row, count in enumerate(blocks):
            if total and total + count > most:
                yield range(first, row)
                first, total = row, 0
            total += count
        yield range(first, len(blocks))

    def close(self) -> None:
        """Close all file handles."""
        while self._shards:
            self._shards.popitem()[1].close()

    def __del__(self) -> None:
        self.close()

    def _read_parts(self, indices: Sequence[int], blocks: Sequence[int]) -> list[Tensor]:
        """The first `blocks` token blocks of every sample, one after the other, for every part `[N, ...]`."""
        layouts, total = self._layouts, sum(blocks)
        for part, layout in enumerate(layouts):
            if len(self._buffers[part]) < total * layout.record_bytes:
                self._buffers[part] = np.empty(total * layout.record_bytes, np.uint8)
        records = [
            buffer[: total * layout.record_bytes].reshape(total, layout.record_bytes)
            for buffer, layout in zip(self._buffers, layouts, strict=True)
        ]
        first = 0
        for index, count in zip(indices, blocks, strict=True):
            self._read_into(int(index), [part[first : first + count] for part in records])
            first += count
        return [
            torch.from_numpy(part[:, : layout.chunk_bytes].view(layout.dtype).reshape(total, *shape))
            for part, layout, shape in zip(records, layouts, self._shapes, strict=True)
        ]

    def _read_into(self, index: int, records: Sequence[NDArray[np.uint8]]) -> None:
        number, row = divmod(index, self.store.layout.samples)
        blocks, layouts = len(records[0]), self._layouts
        try:
            shard = self._open(number)
            for descriptor, starts, part in zip(shard.descriptors, shard.starts, records, strict=True):
                _read_into(descriptor, starts[row], part.reshape(-1))
            require_checksums(records, layouts, shard.checksums[row][:blocks])
        except (ValueError, OverflowError, FileNotFoundError) as error:
            raise StoreError(
                f"shard {number} of {self.store.path} is damaged at sample {index}",
                expected="the bytes that the ledger recorded",
                found=error,
                remedy="`kvpipe repair` writes damaged shards anew, given the teacher",
            ) from error

    def _open(self, number: int) -> _OpenShard:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        while len(self._shards) >= self._open_limit:
            self._shards.popitem(last=False)[1].close()
        shard = _OpenShard([], [], self.store.ledger.checksums(number).tolist())
        try:
            for path, layout in zip(self.store.shard_paths(number), self._layouts, strict=True):
                shard.descriptors.append(os.open(path, os.O_RDONLY))
                shard.starts.append(sample_starts(_index(shard.descriptors[-1], layout), layout))
        except BaseException:
            shard.close()
            raise
        self._shards[number] = shard
        return shard


def _index(descriptor: int, layout: ShardLayout) -> NDArray[np.int64]:
    """The index at the end of a shard's file. Raises ValueError where it is damaged."""
    start = os.fstat(descriptor).st_size - layout.index_bytes
    if start < 0:
        raise ValueError(f"the file cannot hold an index of {layout.index_bytes} bytes")
    tail = np.empty(layout.index_bytes, np.uint8)
    _read_into(descriptor, start, tail)
    return read_index(tail, layout)


def _read_into(descriptor: int, start: int, buffer: NDArray[np.uint8]) -> None:
    """Fill a buffer from a file. Raises ValueError where there is no such place, or the file ends too early."""
    if start < 0:
        raise ValueError("token blocks are missing or misplaced")
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer.data[done:]], start + done)
        if count == 0:
            raise ValueError(f"the file ends {len(buffer) - done} bytes early")
        done += count
