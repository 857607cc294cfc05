"""What `kvpipe bench` reads, and says it has read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kvpipe.kvcache.errors import ConfigError, StoreError
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.bench import bench
from kvpipe.pipeline.bench_writing import Writing

MakeStore = Callable[..., tuple[KVStore, Any]]


@pytest.mark.parametrize(
    "options",
    [{}, {"codec": "int4"}, {"kept": [3, 10, 0, 1, 20]}, {"query_heads": 4}],
    ids=["raw", "int4", "evicted", "queries"],
)
def test_every_sample_with_kv_is_read_in_every_pass(make_store: MakeStore, options: dict[str, Any]) -> None:
    store, _ = make_store([7, 40, 33, 2, 64], **options)
    found = bench(store.path, batch_size=2)
    files = sum(path.stat().st_size for shard in range(store.num_shards) for path in store.shard_paths(shard))
    assert found.num_bytes == files
    assert found.queries == ("query_heads" in options)
    assert found.tokens == int(store.kv_length.sum())
    assert found.batches == (2 if "kept" in options else 3)
    for taken in (found.plain, found.stream, found.random):
        assert min(taken.first_seconds, taken.seconds) > 0
    assert found.first_batch_seconds > 0
    assert isinstance(found.writing, Writing)
    assert found.codec == options.get("codec", "raw")


def test_a_store_that_cannot_be_read_is_refused(make_store: MakeStore) -> None:
    store, _ = make_store([7, 40, 33])
    with pytest.raises(ConfigError, match="--batch-size"):
        bench(store.path, batch_size=0)
    data = bytearray(store.shard_path(1).read_bytes())
    data[100] ^= 1
    store.shard_path(1).write_bytes(data)
    with pytest.raises(StoreError, match=r"shard 1 .* is damaged"):
        bench(store.path, batch_size=2)


def test_a_store_without_any_kv_is_refused(make_store: MakeStore) -> None:
    store, _ = make_store([7, 40], kept=[0, 0])
    with pytest.raises(StoreError, match="has no readable samples"):
        bench(store.path, batch_size=2)
