"""Read samples back: one contiguous range a sample, every checksum compared with the ledger."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import StoreError
from .layout import KV, from_storage
from .shard import read_index, read_sample
from .store import KVStore

OPEN_SHARDS = 128
"""File handles kept: shards are visited a few at a time."""


@dataclass(frozen=True)
class _OpenShard:
    descriptor: int
    index: NDArray[np.int64]
    checksums: NDArray[np.int64]


class KVReader:
    """Random access to the samples of a complete store.

    Opens a shard at first use. Nothing reaches the caller that does not match the ledger: damage raises
    StoreError naming the shard and the sample.
    """

    def __init__(self, store: KVStore) -> None:
        self._shards: OrderedDict[int, _OpenShard] = OrderedDict()
        # Reused for every sample: fresh pages cost more than the bytes that go into them.
        self._buffer = np.empty(0, np.uint8)
        store.require_complete()
        self.store = store

    def read(self, indices: Sequence[int], num_tokens: int | None = None) -> KV:
        """KV `[L, 2, B, H, T, D]` of the samples at `indices`, in the store's logical dtype.

        T is `num_tokens`, by default the longest of the samples; tokens past a sample's end are zero.
        """
        layout, lengths = self.store.layout, self.store.length
        num_tokens = int(max(lengths[i] for i in indices)) if num_tokens is None else num_tokens
        padded = layout.blocks_of(num_tokens) * layout.block
        shape = (layout.num_layers, 2, len(indices), layout.num_kv_heads, padded, layout.head_dim)
        out = np.empty(shape, dtype=layout.dtype)
        for row, index in enumerate(indices):
            self._read_into(int(index), out[:, :, row])
        return from_storage(out, self.store.dtype)[..., :num_tokens, :]

    def close(self) -> None:
        """Close all file handles."""
        while self._shards:
            os.close(self._shards.popitem()[1].descriptor)

    def __del__(self) -> None:
        self.close()

    def _read_into(self, index: int, out: NDArray[np.generic]) -> None:
        layout = self.store.layout
        number, row = divmod(index, layout.samples)
        blocks = min(layout.blocks_of(int(self.store.length[index])), out.shape[3] // layout.block)
        try:
            shard = self._open(number)
            entries = shard.index[row, :blocks]
            start, stop = int(entries[0, 0]), int(entries[-1].sum())
            limit = blocks * layout.record_bytes
            if len(self._buffer) < limit:
                self._buffer = np.empty(limit, np.uint8)
            data = _read_range(shard.descriptor, start, stop, self._buffer[:limit])
            read_sample(data, layout, entries - np.array([start, 0]), shard.checksums[row, :blocks], out)
        except (ValueError, OverflowError, FileNotFoundError) as error:
            raise StoreError(
                f"shard {number} of {self.store.path} is damaged at sample {index}",
                expected="the bytes that the ledger recorded",
                found=error,
                remedy="`kvpipe repair` writes damaged shards anew, given the teacher",
            ) from error
        out[:, :, :, blocks * layout.block :] = 0

    def _open(self, number: int) -> _OpenShard:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        while len(self._shards) >= OPEN_SHARDS:
            os.close(self._shards.popitem(last=False)[1].descriptor)
        checksums = self.store.ledger.checksums(number)
        descriptor = os.open(self.store.shard_path(number), os.O_RDONLY)
        try:
            size, index_bytes = os.fstat(descriptor).st_size, self.store.layout.index_bytes
            tail = _read_range(descriptor, max(size - index_bytes, 0), size, np.empty(index_bytes, np.uint8))
            index = read_index(tail, self.store.layout)
        except BaseException:
            os.close(descriptor)
            raise
        self._shards[number] = _OpenShard(descriptor, index, checksums)
        return self._shards[number]


def _read_range(descriptor: int, start: int, stop: int, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes `start:stop` of a file, in `buffer`. Raises ValueError for a range it cannot hold or the file has not."""
    if start < 0 or not 0 <= stop - start <= len(buffer):
        raise ValueError(f"a range of {stop - start} bytes where at most {len(buffer)} belong")
    data = buffer[: stop - start]
    done = 0
    while done < len(data):
        count = os.preadv(descriptor, [data.data[done:]], start + done)
        if count == 0:
            raise ValueError(f"the file ends {len(data) - done} bytes early")
        done += count
    return data
