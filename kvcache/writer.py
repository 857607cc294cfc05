"""Write shards while the teacher computes: bounded memory, whole files only."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Literal

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from .errors import ModelError
from .files import partial_path
from .layout import KVGeometry, Pairs
from .shard import ShardFile
from .staging import Records, Staging
from .store import KVStore

OnNonfinite = Literal["exclude", "stop"]

MAX_WAITING = 8
"""Batches to write, or shards to flush, that may wait: a slow disk holds the teacher back."""


@dataclass(frozen=True)
class _Job:
    """Something for the thread to do, and the buffer that is free once it is done, or will never be."""

    work: Callable[[], None]
    staging: Staging | None = None


class ShardWriter:
    """Writes captured batches into shards; a shard appears once its last sample has come.

    KV on a GPU is written by a thread while the teacher computes on. KV on the CPU is written at once by the caller:
    a model that computes on every core stands still for as long as one of them is taken, and longer (measured in
    `benchmarks/extraction.py`). What remains of a shard, flushing it to the disk, is the thread's in both cases.

    A sample with NaN or infinity is never written as good: it is left out of its shard for good, as the
    ledger says; with `on_nonfinite="stop"` it raises ModelError instead.

    Batches may come in any order; samples of shards that are not in `shards` are ignored. Memory is bounded by
    `queue_size + 1` batches. A failure in the thread is raised, as the error it was, by the next `put` or by
    leaving the context. Unfinished shards are dropped, never left behind.
    """

    def __init__(
        self, store: KVStore, shards: Iterable[int], queue_size: int = 2, on_nonfinite: OnNonfinite = "exclude"
    ) -> None:
        self.bytes_written = 0
        self.wait_seconds = 0.0
        self._on_nonfinite = on_nonfinite
        self._store = store
        self._pending = set(shards)
        self._files: dict[int, ShardFile] = {}
        # Batches are copied out of the model's memory into the same few buffers: a model whose KV is held
        # back has to compute the next batch in fresh pages, which costs more than the copy.
        self._free: queue.LifoQueue[Staging] = queue.LifoQueue()
        for _ in range(queue_size + 1):
            self._free.put(Staging())
        self._jobs: queue.Queue[_Job | None] = queue.Queue(MAX_WAITING)
        self._error: BaseException | None = None
        self._stream: torch.cuda.Stream | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvpipe-writer", daemon=True)

    def __enter__(self) -> ShardWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        start = time.perf_counter()
        try:
            self._jobs.put(None)
            self._ended.wait()
        except BaseException as interruption:
            # A signal: what the thread has begun is finished, what it has not is dropped. (A `join` that was
            # interrupted may take the thread for ended, so an event is waited for.)
            self._error = interruption
            self._jobs.put(None)
            self._ended.wait()
            raise
        finally:
            self._drop_unfinished()
        self._thread.join()
        self.wait_seconds += time.perf_counter() - start
        if self._error is not None and error is None:
            raise self._error

    def _drop_unfinished(self) -> None:
        for file in list(self._files.values()):
            file.discard()
        for shard in self._pending:
            # One that a signal met between its creation and its registration.
            for path in self._store.shard_paths(shard):
                partial_path(path).unlink(missing_ok=True)

    @torch.no_grad()
    def put(
        self,
        indices: Sequence[int],
        pairs: Pairs,
        positions: Int[Tensor, "B T"] | None = None,
        finite: Bool[Tensor, " B"] | None = None,
        queries: Sequence[Shaped[Tensor, "B Hq T D"]] | None = None,
    ) -> None:
        """Hand over one batch: places in the store, and per layer key and value, all of one shape `[B, H, T, D]`; where
        tokens were evicted, also the `positions` of those that are left, and which samples were `finite` before; for a
        store that keeps them, per layer the `queries` of the same tokens.

        `wait_seconds` counts the time the caller stood still, but for the copy out of the model's memory.
        Raises ValueError for KV or queries of another shape or dtype than the store's.
        """
        if self._error is not None:
            raise self._error
        self._check(indices, pairs, queries)
        start = time.perf_counter()
        staging = self._free.get()
        self.wait_seconds += time.perf_counter() - start
        lengths = torch.from_numpy(self._store.kv_length[list(indices)])
        whole = finite.cpu() if finite is not None else torch.ones(len(indices), dtype=torch.bool)
        if pairs[0][0].is_cuda:
            copied = self._copy_beside(pairs, lengths, positions, queries, staging)
            self._jobs.put(_Job(partial(self._write, list(indices), whole, *copied), staging))
            return
        records, kept_finite = staging.fill(pairs, self._store.codec, self._store.layouts, lengths, positions, queries)
        start = time.perf_counter()
        self._add(
            indices, records, whole & kept_finite, lambda shard: self._jobs.put(_Job(partial(self._finish, shard)))
        )
        self.wait_seconds += time.perf_counter() - start
        self._free.put(staging)

    def _check(self, indices: Sequence[int], pairs: Pairs, queries: Sequence[Tensor] | None) -> None:
        geometry = self._store.geometry
        longest = int(self._store.kv_length[list(indices)].max())
        batch, num_kv_heads, num_tokens, head_dim = pairs[0][0].shape
        dtype, query_heads = pairs[0][0].dtype, queries[0].shape[1] if queries else 0
        found = KVGeometry(len(pairs), num_kv_heads, head_dim, dtype, query_heads)
        beside = [(batch, query_heads, num_tokens, head_dim, dtype)] * len(pairs) if queries else []
        alike = [(*tensor.shape, tensor.dtype) for tensor in queries or []] == beside
        if found != geometry or not alike or batch != len(indices) or num_tokens < longest:
            raise ValueError(
                f"KV that does not fit the store: expected {geometry} for {len(indices)} samples of up to {longest} "
                f"tokens, found {found} for {batch} samples of {num_tokens}"
            )

    def _copy_beside(
        self,
        pairs: Pairs,
        lengths: Tensor,
        positions: Tensor | None,
        queries: Sequence[Tensor] | None,
        staging: Staging,
    ) -> tuple[Records, Tensor, torch.cuda.Event]:
        """What `staging.fill` returns, and the event after which it holds: a side stream copies while the teacher
        computes on."""
        device = pairs[0][0].device
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for tensor in chain(*pairs, queries or [], [positions] if positions is not None else []):
                tensor.record_stream(self._stream)
            records, finite = staging.fill(pairs, self._store.codec, self._store.layouts, lengths, positions, queries)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return records, finite, copied

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._ended.set()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is None:
                try:
                    job.work()
                except BaseException as error:  # noqa: BLE001 - handed to the main thread as it is
                    self._error = error
            if job.staging is not None:
                self._free.put(job.staging)

    def _write(
        self, indices: list[int], whole: Tensor, records: Records, kept_finite: Tensor, copied: torch.cuda.Event
    ) -> None:
        copied.synchronize()
        self._add(indices, records, whole & kept_finite, self._finish)

    def _add(self, indices: Sequence[int], records: Records, finite: Tensor, finish: Callable[[int], None]) -> None:
        """Write samples to their places; `finish` is called for a shard that has them all."""
        layout, data = self._store.layout, [part.numpy() for part in records]
        for row, index in enumerate(indices):
            shard, position = divmod(index, layout.samples)
            if shard not in self._pending:
                continue
            file = self._file(shard)
            if file.lengths[position] == 0:
                # Every token was evicted: nothing is left to learn from.
                file.exclude(position)
            elif finite[row]:
                blocks = layout.blocks_of(file.lengths[position])
                file.add(position, [part[row, :blocks] for part in data])
            else:
                self._require_exclusion(index)
                file.exclude(position)
            if file.remaining == 0:
                self._pending.discard(shard)
                finish(shard)

    def _require_exclusion(self, index: int) -> None:
        """Raise ModelError where a sample that is not finite is to stop the extraction."""
        if self._on_nonfinite == "exclude":
            return
        lossy, queries = self._store.codec.lossy, " or queries" if self._store.manifest.queries else ""
        raise ModelError(
            f"the teacher's KV{queries} of sample {self._store.records[index]['id']} is not finite",
            expected="numbers",
            found="NaN or infinity" + (", or scales beyond float16" if lossy else ""),
            remedy=f"Choose a --dtype with more range{' or --codec raw' if lossy else ''}, "
            "or leave such samples out with --on-nonfinite exclude",
        )

    def _file(self, shard: int) -> ShardFile:
        if shard not in self._files:
            samples = self._store.shard_samples(shard)
            lengths = self._store.kv_length[samples.start : samples.stop]
            layouts = list(self._store.layouts.values())
            self._files[shard] = ShardFile(self._store.shard_paths(shard), layouts, lengths)
        return self._files[shard]

    def _finish(self, shard: int) -> None:
        file = self._files[shard]
        self._store.ledger.record(shard, file.finish())
        self.bytes_written += file.nbytes
        del self._files[shard]
