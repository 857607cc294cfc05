"""How fast a store is read, here and now: beside plain reading of its files, the limit of the disk or of its cache.

And how fast it would be written: see `bench_writing`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

from ..data.batching import ShuffledBatches
from ..kvcache.errors import ConfigError
from ..kvcache.reader import KVReader
from ..kvcache.store import KVStore
from .bench_writing import Writing, bench_writing
from .compatibility import require_learnable
from .progress import progress_bar
from .timing import PASSES, Timed, in_turn


@dataclass(frozen=True)
class Bench:
    """`plain` reads the files of the KV, and of the `queries` if there are any, as they lie; `stream` is an epoch as a
    student reads it who needs both; `random` as many batches from anywhere: the same bytes, tokens and batches.
    `first_batch_seconds` is from opening the store to the first batch of an epoch; `writing` is a sentence where
    it cannot be measured."""

    num_bytes: int
    queries: bool
    codec: str
    tokens: int
    batches: int
    first_batch_seconds: float
    plain: Timed
    stream: Timed
    random: Timed
    writing: Writing | str


def bench(path: Path, batch_size: int, progress: Progress | None = None) -> Bench:
    """Read a store in three ways, and write a part of it anew in two.

    Raises ConfigError for a batch of nothing, StoreError for a store that is damaged, incomplete, or without any KV.
    """
    if batch_size < 1:
        raise ConfigError("no such batch", expected="at least 1", found=batch_size, remedy="Mend --batch-size")
    start = time.perf_counter()
    store = KVStore.open(path)
    reader = KVReader(store)
    samples = store.with_kv
    require_learnable(store, "readable", samples)
    order = ShuffledBatches(samples, store.length, batch_size, 0, store.layout.samples)
    read_all(reader, [next(iter(order))])
    first_batch = time.perf_counter() - start
    drawn = np.random.default_rng(0).permutation(samples)
    anywhere = [drawn[i : i + batch_size].tolist() for i in range(0, len(drawn), batch_size)]
    works = (lambda: _read_plainly(store), lambda: read_all(reader, order), lambda: read_all(reader, anywhere))
    with progress or progress_bar() as bar:
        task = bar.add_task("bench", total=(len(works) + 2) * (PASSES + 1), status="")
        plain, stream, random = in_turn(works, lambda: bar.advance(task))
        writing = bench_writing(store, batch_size, lambda: bar.advance(task))
        bar.update(task, completed=bar.tasks[task].total)
    num_bytes = sum(path.stat().st_size for path in _files(store))
    tokens = int(store.kv_length[samples].sum())
    return Bench(
        num_bytes=num_bytes,
        queries=store.manifest.queries,
        codec=store.codec.name,
        tokens=tokens,
        batches=len(anywhere),
        first_batch_seconds=first_batch,
        plain=plain,
        stream=stream,
        random=random,
        writing=writing,
    )


def read_all(reader: KVReader, batches: Iterable[Sequence[int]]) -> None:
    """Read batches as a student does who needs all that is there."""
    for batch in batches:
        reader.read(batch)
        if reader.store.manifest.queries:
            reader.read_queries(batch)


def _files(store: KVStore) -> list[Path]:
    return [path for shard in range(store.num_shards) for path in store.shard_paths(shard)]


def _read_plainly(store: KVStore) -> None:
    buffer = np.empty(max(path.stat().st_size for path in _files(store)), np.uint8)
    for path in _files(store):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer.data):
                pass
