"""Write shards while the teacher computes: one thread, a bounded queue, whole files only."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from .layout import to_storage
from .shard import ShardFile
from .store import KVStore

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Batch:
    """Samples at `indices` of the store; `kv` `[L, 2, B, H, T, D]` lies in `buffer` once `copied` has happened."""

    indices: list[int]
    kv: Tensor
    buffer: Tensor
    copied: torch.cuda.Event | None


class ShardWriter:
    """Writes captured batches into shards; a shard appears once its last sample has come.

    Batches may come in any order; samples of shards that are not in `shards` are ignored. Memory is bounded by
    `queue_size + 1` batches. A failure in the thread is raised, as the error it was, by the next `put` or by
    leaving the context. Unfinished shards are dropped, never left behind.
    """

    def __init__(self, store: KVStore, shards: Iterable[int], queue_size: int = 2) -> None:
        self.bytes_written = 0
        self.wait_seconds = 0.0
        self._store = store
        self._pending = set(shards)
        self._files: dict[int, ShardFile] = {}
        # Batches are copied out of the model's memory into the same few buffers: a model whose KV is held
        # back has to compute the next batch in fresh pages, which costs more than the copy.
        self._buffers: queue.Queue[Tensor] = queue.Queue()
        for _ in range(queue_size + 1):
            self._buffers.put(torch.empty(0))
        self._queue: queue.Queue[_Batch | None] = queue.Queue()
        self._error: BaseException | None = None
        self._stream: torch.cuda.Stream | None = None
        self._thread = threading.Thread(target=self._run, name="kvpipe-writer", daemon=True)

    def __enter__(self) -> ShardWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        start = time.perf_counter()
        self._queue.put(None)
        self._thread.join()
        self.wait_seconds += time.perf_counter() - start
        for file in self._files.values():
            file.discard()
        if self._error is not None and error is None:
            raise self._error

    @torch.no_grad()
    def put(self, indices: Sequence[int], pairs: Pairs) -> None:
        """Hand over one batch: positions in the store, and per layer key and value, all of one shape `[B, H, T, D]`.

        Returns as soon as a buffer is free and the copy into it has begun; `wait_seconds` counts the time none was.
        """
        if self._error is not None:
            raise self._error
        start = time.perf_counter()
        buffer = self._buffers.get()
        self.wait_seconds += time.perf_counter() - start
        self._queue.put(self._stage(list(indices), pairs, buffer))

    def _stage(self, indices: list[int], pairs: Pairs, buffer: Tensor) -> _Batch:
        first = pairs[0][0]
        shape = (len(pairs), 2, *first.shape)
        if len(buffer) < math.prod(shape) or buffer.dtype != first.dtype:
            buffer = torch.empty(math.prod(shape), dtype=first.dtype, pin_memory=first.is_cuda)
        kv = buffer[: math.prod(shape)].view(shape)
        if not first.is_cuda:
            _copy(pairs, kv)
            return _Batch(indices, kv, buffer, None)
        # A side stream copies while the teacher computes on.
        self._stream = self._stream or torch.cuda.Stream(first.device)
        self._stream.wait_stream(torch.cuda.current_stream(first.device))
        with torch.cuda.stream(self._stream):
            for tensor in (tensor for pair in pairs for tensor in pair):
                tensor.record_stream(self._stream)
            _copy(pairs, kv)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return _Batch(indices, kv, buffer, copied)

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._store_batch(batch)
                except BaseException as error:  # noqa: BLE001 - handed to the main thread as it is
                    self._error = error
            self._buffers.put(batch.buffer)

    def _store_batch(self, batch: _Batch) -> None:
        if batch.copied is not None:
            batch.copied.synchronize()
        kv = to_storage(batch.kv)
        for row, index in enumerate(batch.indices):
            shard, position = divmod(index, self._store.layout.samples)
            if shard not in self._pending:
                continue
            file = self._file(shard)
            file.add(position, kv[:, :, row])
            if file.remaining == 0:
                self._finish(shard)

    def _file(self, shard: int) -> ShardFile:
        if shard not in self._files:
            samples = self._store.shard_samples(shard)
            lengths = self._store.length[samples.start : samples.stop]
            self._files[shard] = ShardFile(self._store.shard_path(shard), self._store.layout, lengths)
        return self._files[shard]

    def _finish(self, shard: int) -> None:
        checksums = self._files[shard].finish()
        self.bytes_written += self._files.pop(shard).nbytes
        self._store.record_shard(shard, checksums)
        self._pending.discard(shard)


def _copy(pairs: Pairs, kv: Tensor) -> None:
    for layer, pair in zip(kv, pairs, strict=True):
        for target, tensor in zip(layer, pair, strict=True):
            target.copy_(tensor, non_blocking=True)
