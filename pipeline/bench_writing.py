"""How fast shards are written, here and now: beside plain writing of as many bytes, flushed, the limit of the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..kvcache.reader import KVReader
from ..kvcache.store import KVStore
from ..kvcache.writer import ShardWriter
from .scratch import scratch_folder
from .teacher_pass import Captured
from .timing import Timed, in_turn

MOST_BYTES = 250_000_000
"""Of KV, and queries, that are written anew; they wait in memory for it."""


@dataclass(frozen=True)
class Writing:
    """Of the same bytes: `plain` as they lie, `shards` by the writer, from batches in memory."""

    num_bytes: int
    plain: Timed
    shards: Timed


def bench_writing(store: KVStore, batch_size: int, done: Callable[[], None]) -> Writing | str:
    """Write some of a store's shards anew, into a folder beside it that is removed. `done` is called after each of the
    passes of both. Where it cannot be done, the reason.
    """
    shards = _some_shards(store)
    files = [path for shard in shards for path in store.shard_paths(shard)]
    num_bytes, beside = sum(path.stat().st_size for path in files), store.path.absolute().parent
    if not files:
        return "no shard has all of its samples"
    # As they lie, by the writer, and what it writes anew before it takes their place.
    if shutil.disk_usage(beside).free < 3 * num_bytes:
        return f"{3 * num_bytes / 1e6:,.0f} MB are not free at {beside}"
    contents, batches = [path.read_bytes() for path in files], list(_batches(store, shards, batch_size))
    try:
        with scratch_folder(beside) as folder:
            twin = _without_kv(store, folder / "bench.zarr")
            works = (partial(write_plainly, contents, folder), partial(_write, twin, shards, batches))
            return Writing(num_bytes, *in_turn(works, done))
    except OSError as error:
        return f"{error.strerror} at {beside}"


def _some_shards(store: KVStore) -> list[int]:
    """The first whose samples all have KV, as many as fit into MOST_BYTES, at least one."""
    geometry, total = store.geometry, 0
    found: list[int] = []
    heads = 2 * geometry.num_kv_heads + geometry.num_query_heads
    token_bytes = geometry.num_layers * heads * geometry.head_dim * geometry.dtype.itemsize
    for shard in range(store.num_shards):
        samples = store.shard_samples(shard)
        if np.isin(samples, store.excluded).any():
            continue
        total += int(store.kv_length[samples.start : samples.stop].sum()) * token_bytes
        if found and total > MOST_BYTES:
            break
        found.append(shard)
    return found


def _batches(store: KVStore, shards: list[int], batch_size: int) -> Iterator[tuple[list[int], Captured]]:
    """Samples of these shards, and what an extraction hands to the writer of them."""
    reader = KVReader(store)
    for shard in shards:
        samples = list(store.shard_samples(shard))
        for first in range(0, len(samples), batch_size):
            batch = samples[first : first + batch_size]
            kv, positions = reader.read_with_positions(batch)
            queries = list(reader.read_queries(batch)) if store.manifest.queries else None
            yield batch, ([(key, value) for key, value in kv], positions, None, queries)


def _without_kv(store: KVStore, path: Path) -> KVStore:
    """The same store with nothing in it yet; whatever is beside the KV is linked to."""
    path.mkdir()
    for entry in store.path.absolute().iterdir():
        if entry.name in (*store.parts, "ledger"):
            (path / entry.name).mkdir()
            (path / entry.name / "zarr.json").symlink_to(entry / "zarr.json")
        else:
            (path / entry.name).symlink_to(entry)
    return KVStore.open(path)


def _write(store: KVStore, shards: list[int], batches: list[tuple[list[int], Captured]]) -> None:
    with ShardWriter(store, shards) as writer:
        for batch, captured in batches:
            writer.put(batch, *captured)


def write_plainly(contents: list[bytes], folder: Path) -> None:
    """A file for each of them, flushed."""
    for number, content in enumerate(contents):
        # Buffered, or a file of 2 GB and more would not be written whole; a content this large passes the buffer by.
        with (folder / str(number)).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
