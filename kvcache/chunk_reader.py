"""Read chunks back: one contiguous range a sample and part, every checksum compared with the ledger."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import StoreError
from .shard import ShardLayout, read_index, require_checksums, sample_starts
from .store import KVStore

CACHED_BYTES = 2**20
"""Of what is read at once, decoded: by the time it is checked and copied on, it has not left the processor's cache."""

OPEN_FILES = 128
"""File handles kept: shards are visited a few at a time."""


@dataclass(frozen=True)
class _OpenShard:
    """For every part a file, where each sample begins in it, and the ledger's checksums of a sample's blocks."""

    descriptors: list[int]
    starts: list[list[int]]
    checksums: list[list[list[int]]]

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


class ChunkReader:
    """Random access to the token blocks of some parts of a complete store; the files of others are never opened.

    Opens a shard at first use. Nothing reaches the caller that does not match the ledger: damage raises
    StoreError naming the shard and the sample.
    """

    def __init__(self, store: KVStore, names: Sequence[str], decoded_bytes: int = 0) -> None:
        """`decoded_bytes` are those of a token block, where it is decoded into more than is stored."""
        self._shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._store = store
        self._places = [list(store.parts).index(name) for name in names]
        self._layouts = [store.layouts[name] for name in names]
        self._shapes = [store.parts[name].content_shape for name in names]
        self._buffers = [np.empty(0, np.uint8) for _ in names]
        block = max(decoded_bytes, sum(layout.record_bytes for layout in self._layouts))
        self._most = CACHED_BYTES // block
        self._open_limit = max(1, OPEN_FILES // len(store.parts))

    def read(self, indices: Sequence[int], blocks: Sequence[int]) -> Iterator[tuple[range, list[Tensor]]]:
        """Rows of `indices`, a few at a time, and for every part the first `blocks` token blocks of each, one after the
        other, `[N, ...]`: valid until the next."""
        for rows in self._groups(blocks):
            yield rows, self._read_parts([indices[row] for row in rows], [blocks[row] for row in rows])

    def close(self) -> None:
        """Close all file handles."""
        while self._shards:
            self._shards.popitem()[1].close()

    def __del__(self) -> None:
        self.close()

    def _groups(self, blocks: Sequence[int]) -> Iterator[range]:
        """Rows whose token blocks are read and decoded together, few enough to be in the processor's cache between."""
        first, total = 0, 0
        for row, count in enumerate(blocks):
            if total and total + count > self._most:
                yield range(first, row)
                first, total = row, 0
            total += count
        yield range(first, len(blocks))

    def _read_parts(self, indices: Sequence[int], blocks: Sequence[int]) -> list[Tensor]:
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
            self._read_sample(int(index), [part[first : first + count] for part in records])
            first += count
        return [
            torch.from_numpy(part[:, : layout.chunk_bytes].view(layout.dtype).reshape(total, *shape))
            for part, layout, shape in zip(records, layouts, self._shapes, strict=True)
        ]

    def _read_sample(self, index: int, records: Sequence[NDArray[np.uint8]]) -> None:
        number, row = divmod(index, self._store.layout.samples)
        try:
            shard = self._open(number)
            for part, own in enumerate(records):
                _read_into(shard.descriptors[part], shard.starts[part][row], own.reshape(-1))
                require_checksums(own, self._layouts[part], shard.checksums[part][row][: len(own)])
        except (ValueError, OverflowError, FileNotFoundError) as error:
            raise StoreError(
                f"shard {number} of {self._store.path} is damaged at sample {index}",
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
        paths, checksums = self._store.shard_paths(number), self._store.ledger.checksums(number)
        shard = _OpenShard([], [], [checksums[:, place].tolist() for place in self._places])
        try:
            for place, layout in zip(self._places, self._layouts, strict=True):
                shard.descriptors.append(os.open(paths[place], os.O_RDONLY))
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
