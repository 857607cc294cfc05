"""What `kvpipe bench` writes, and that nothing of it is left."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.bench_writing import Writing, bench_writing
from kvpipe.pipeline.timing import PASSES

MakeStore = Callable[..., tuple[KVStore, Any]]


@pytest.mark.parametrize(
    "options",
    [{}, {"kept": [3, 10, 1, 1, 20]}, {"query_heads": 4}, {"kept": [3, 10, 1, 1, 20], "query_heads": 4}],
    ids=["raw", "evicted", "queries", "evicted, with queries"],
)
def test_what_is_written_are_the_very_shards_of_the_store(make_store: MakeStore, options: dict[str, Any]) -> None:
    store, _ = make_store([7, 40, 33, 2, 64], **options)
    paths = [path for shard in range(store.num_shards) for path in store.shard_paths(shard)]
    expected, written = [path.read_bytes() for path in paths], []

    def look() -> None:
        (twin,) = store.path.parent.glob(".kvpipe-scratch-*/bench.zarr")
        found = [twin / path.relative_to(store.path) for path in paths]
        written.append([path.read_bytes() for path in found if path.exists()])

    found = bench_writing(store, 2, look)
    assert isinstance(found, Writing)
    assert found.num_bytes == sum(map(len, expected))
    assert min(found.plain.seconds, found.shards.seconds) > 0
    assert written == [[], *[expected] * (2 * PASSES + 1)]
    assert [path.read_bytes() for path in paths] == expected
    assert list(store.path.parent.iterdir()) == [store.path]


def test_a_lossy_store_is_written_in_its_own_codec(make_store: MakeStore) -> None:
    store, _ = make_store([7, 40, 33, 2, 64], codec="int4")
    found = bench_writing(store, 2, lambda: None)
    assert isinstance(found, Writing)
    assert found.num_bytes == sum(
        path.stat().st_size for shard in range(store.num_shards) for path in store.shard_paths(shard)
    )


def test_shards_that_lack_a_sample_are_not_written(make_store: MakeStore) -> None:
    store, _ = make_store([7, 40, 33, 2, 64], kept=[3, 0, 1, 1, 20])
    found = bench_writing(store, 2, lambda: None)
    assert isinstance(found, Writing)
    assert found.num_bytes == sum(path.stat().st_size for shard in (1, 2) for path in store.shard_paths(shard))
    nothing, _ = make_store([7, 40], kept=[1, 0])
    assert bench_writing(nothing, 2, lambda: None) == "no shard has all of its samples"


def test_without_room_beside_the_store_nothing_is_written(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = make_store([7, 40])
    usage = shutil.disk_usage(store.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    assert str(bench_writing(store, 2, lambda: None)).endswith(f"MB are not free at {store.path.parent}")


def test_a_disk_that_takes_no_more_is_the_reason_given(make_store: MakeStore) -> None:
    store, _ = make_store([7, 40])

    def fill() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert bench_writing(store, 2, fill) == f"No space left on device at {store.path.parent}"
    assert list(store.path.parent.iterdir()) == [store.path]
