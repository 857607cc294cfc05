"""Write shards while the teacher computes: one thread, a bounded queue, whole files only."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from .files import write_atomic
from .layout import to_storage
from .shard import ShardBuilder
from .store import KVStore

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Batch:
    indices: list[int]
    pairs: Pairs
    copied: torch.cuda.Event | None


class ShardWriter:
    """Collects captured batches into shards and writes each shard once its last sample has come.

    Batches may come in any order; samples of shards that are not in `shards` are ignored. Memory is
    bounded by the shards in progress and `queue_size` batches. A failure in the thread is raised, as the
    error it was, by the next `put` or by leaving the context. Unfinished shards are dropped, never written.
    """

    def __init__(self, store: KVStore, shards: Iterable[int], queue_size: int = 2) -> None:
        self.bytes_written = 0
        self.shards_written = 0
        self.wait_seconds = 0.0
        self._store = store
        self._pending = set(shards)
        self._building: dict[int, ShardBuilder] = {}
        self._queue: queue.Queue[_Batch | None] = queue.Queue(queue_size)
        self._error: BaseException | None = None
        self._stream: torch.cuda.Stream | None = None
        self._thread = threading.Thread(target=self._run, name="kvpipe-writer", daemon=True)

    def __enter__(self) -> ShardWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def put(self, indices: Sequence[int], pairs: Pairs) -> None:
        """Hand over one batch: positions in the store, and per layer key and value `[B, H, T, D]`.

        Returns as soon as the queue has room; `wait_seconds` counts the time it had none.
        """
        if self._error is not None:
            raise self._error
        batch = self._to_host(list(indices), pairs)
        start = time.perf_counter()
        self._queue.put(batch)
        self.wait_seconds += time.perf_counter() - start

    def _to_host(self, indices: list[int], pairs: Pairs) -> _Batch:
        """On CUDA: start the copy into pinned memory on a side stream, so that compute goes on."""
        device = pairs[0][0].device
        if device.type != "cuda":
            return _Batch(indices, pairs, None)
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for tensor in (tensor for pair in pairs for tensor in pair):
                tensor.record_stream(self._stream)
            host = [(key.to("cpu", non_blocking=True), value.to("cpu", non_blocking=True)) for key, value in pairs]
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return _Batch(indices, host, copied)

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._store_batch(batch)
                except BaseException as error:  # noqa: BLE001 - handed to the main thread as it is
                    self._error = error
            del batch

    def _store_batch(self, batch: _Batch) -> None:
        if batch.copied is not None:
            batch.copied.synchronize()
        arrays = [(to_storage(key), to_storage(value)) for key, value in batch.pairs]
        for row, index in enumerate(batch.indices):
            shard, position = divmod(index, self._store.layout.samples)
            if shard not in self._pending:
                continue
            builder = self._builder(shard)
            builder.add(position, [(key[row], value[row]) for key, value in arrays])
            if builder.remaining == 0:
                self._finish(shard)

    def _builder(self, shard: int) -> ShardBuilder:
        if shard not in self._building:
            samples = self._store.shard_samples(shard)
            lengths = self._store.length[samples.start : samples.stop]
            self._building[shard] = ShardBuilder(self._store.layout, lengths)
        return self._building[shard]

    def _finish(self, shard: int) -> None:
        data, checksums = self._building.pop(shard).finish()
        write_atomic(self._store.shard_path(shard), data.data)
        self._store.record_shard(shard, checksums)
        self._pending.discard(shard)
        self.bytes_written += len(data)
        self.shards_written += 1
