"""Read samples back: one contiguous range a sample, every checksum compared with the ledger."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .errors import StoreError
from .layout import KV, from_storage, to_storage
from .shard import ShardLayout, read_index, require_checksums, sample_start
from .store import KVStore

OPEN_FILES = 128
"""File handles kept: shards are visited a few at a time."""


@dataclass(frozen=True)
class _OpenShard:
    """For every part a file and its index `[samples, blocks, 2]`; and the ledger's checksums."""

    descriptors: list[int]
    indices: list[NDArray[np.int64]]
    checksums: NDArray[np.int64]

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
        # Reused for every batch: fresh pages cost more than the bytes that go into them.
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
        parts = self._read_parts(indices, blocks)
        positions = self._positions(parts.pop(), blocks, num_tokens) if self.store.evicts else None
        # NumPy's small copies cost half of what torch's do.
        chunks = to_storage(self.store.codec.decode(parts, self.store.dtype))
        padded = grid.blocks_of(num_tokens) * grid.block
        shape = (geometry.num_layers, 2, len(blocks), geometry.num_kv_heads, padded, geometry.head_dim)
        out = np.empty(shape, dtype=chunks.dtype)
        first = 0
        for row, (count, length) in enumerate(zip(blocks, lengths, strict=True)):
            own = out[:, :, row]
            for blk in range(count):
                own[:, :, :, blk * grid.block : (blk + 1) * grid.block] = chunks[first + blk]
            own[:, :, :, length:] = 0
            first += count
        return from_storage(out, geometry.dtype)[..., :num_tokens, :], positions

    def _positions(self, stored: Int[Tensor, "N block"], blocks: Sequence[int], num_tokens: int) -> Int[Tensor, "B T"]:
        samples = [rows.flatten() for rows in stored.long().split(list(blocks))]
        padded = pad_sequence(samples, batch_first=True, padding_value=-1)
        return F.pad(padded, (0, max(0, num_tokens - padded.shape[1])), value=-1)[:, :num_tokens]

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
            for descriptor, entries, layout, part in zip(
                shard.descriptors, shard.indices, layouts, records, strict=True
            ):
                _read_into(descriptor, sample_start(entries[row, :blocks], layout), part.reshape(-1))
            require_checksums(records, layouts, shard.checksums[row, :blocks])
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
        shard = _OpenShard([], [], self.store.ledger.checksums(number))
        try:
            for path, layout in zip(self.store.shard_paths(number), self._layouts, strict=True):
                shard.descriptors.append(os.open(path, os.O_RDONLY))
                shard.indices.append(_index(shard.descriptors[-1], layout))
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
    """Fill a buffer from a file. Raises ValueError where the file ends too early."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer.data[done:]], start + done)
        if count == 0:
            raise ValueError(f"the file ends {len(buffer) - done} bytes early")
        done += count
