"""What `kvpipe verify` says of shards: sound, damaged, or not written yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.verify import Damage, describe, require_sound, verify_shards

MakeStore = Callable[..., tuple[KVStore, Any]]


def damages(store: KVStore) -> list[Damage]:
    return [damage for damage in verify_shards(store) if damage is not None]


def test_a_sound_store_has_nothing_to_tell(make_store: MakeStore) -> None:
    store, _ = make_store([5, 40, 33])
    assert damages(store) == []
    require_sound(store, [])


def test_every_part_of_a_shard_is_read(make_store: MakeStore) -> None:
    store, _ = make_store([5, 40, 33, 2], codec="int4", kept=[2, 20, 16, 1], query_heads=4)
    assert list(store.parts) == ["kv", "kv_scale", "kv_position", "queries"]
    assert damages(store) == []
    for path in store.shard_paths(1):
        whole = path.read_bytes()
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        assert describe(damages(store)) == ["shard 1, samples 2: chunks fail their checksums"], path
        path.unlink()
        assert describe(damages(store)) == ["shard 1, samples 2-3: its file is missing"], path
        path.write_bytes(whole)
    assert damages(store) == []


def test_shards_that_were_never_written_make_a_store_incomplete(make_store: MakeStore) -> None:
    store, _ = make_store([5] * 10)
    for shard in (1, 2, 4):
        store.ledger.path(shard).unlink()
    found = damages(store)
    assert describe(found) == ["not written yet: shards 1-2, 4"]
    with pytest.raises(StoreError, match=r"is incomplete: expected 5 shards, found 2\. Run the same `kvpipe extract`"):
        require_sound(store, found)


def test_damage_is_told_apart_from_what_was_never_written(make_store: MakeStore) -> None:
    store, _ = make_store([5] * 10)
    store.ledger.path(0).unlink()
    entry = store.ledger.path(1)
    entry.write_bytes(bytes([entry.read_bytes()[0] ^ 1]) + entry.read_bytes()[1:])
    store.shard_path(3).unlink()
    found = damages(store)
    assert describe(found) == [
        "shard 1, samples 2-3: its ledger entry is damaged",
        "shard 3, samples 6-7: its file is missing",
        "not written yet: shards 0",
    ]
    with pytest.raises(StoreError, match=r"expected 5 sound shards, found 2 damaged: 1, 3\. `kvpipe repair`"):
        require_sound(store, found)
