"""A store is laid out whole, opens only where it is one, and knows by its ledger what is finished."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.integrity import seal
from kvpipe.kvcache.manifest import Manifest
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import ATTRIBUTE, KVStore
from torch import Tensor

MakeStore = Callable[..., tuple[KVStore, Tensor]]


def test_a_store_tells_what_is_in_it(make_store: MakeStore, make_manifest: Callable[..., Manifest]) -> None:
    created, _ = make_store([5, 40, 33])
    store = KVStore.open(str(created.path))
    assert store.shape == (2, 2, 3, 2, 64, 4)
    assert store.dtype == torch.bfloat16
    assert store.manifest == make_manifest()
    assert store.geometry.bytes_per_token == 2 * 2 * 2 * 4 * 2
    assert (store.num_samples, store.layout.samples, store.num_shards, store.truncated) == (3, 2, 2, 0)
    assert store.length.tolist() == [5, 40, 33]
    assert store.input_ids.shape == store.segment_ids.shape == (3, 64)
    assert store.input_ids[0, 4:6].tolist() == [5, 0]
    assert store.segment_ids[0, 4:6].tolist() == [1, -1]
    assert [list(store.shard_samples(shard)) for shard in range(2)] == [[0, 1], [2]]


def test_a_plain_zarr_user_can_open_it(make_store: MakeStore) -> None:
    store, kv = make_store([5, 40, 33])
    group = zarr.open_group(store.path, mode="r")
    bits = group["kv"][:, :, 1, :, :40]
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), kv[:, :, 1, :, :40])
    assert group["spans"].shape == (3, 64, 2)
    assert group["ledger"][:, 0].tolist() == [1, 2, 3]


def test_splits_are_found_by_name(make_store: MakeStore) -> None:
    store, _ = make_store([1, 2, 3], fill=False)
    assert store.indices("train").tolist() == [0, 2]
    assert store.indices("test").tolist() == [1]
    with pytest.raises(StoreError, match="no such split: expected train or test, found dev"):
        store.indices("dev")


def test_any_text_survives(make_store: MakeStore) -> None:
    prompts = ["line\u2028separator\u2029", "\ud800 lone", "\x85\x0b\x0c\x1c\r\n", "é\u0301🦊\x00", ""]
    records = [{"id": str(i), "prompt": prompt, "reasoning": "", "answer": ""} for i, prompt in enumerate(prompts)]
    store, _ = make_store([1] * len(records), records=records, fill=False)
    assert KVStore.open(store.path).records == records


def test_tokenizer_files_survive(make_store: MakeStore) -> None:
    files = {"tokenizer.json": bytes(range(256)), "special_tokens_map.json": b"{}", "merges.txt": b""}
    store, _ = make_store([1], tokenizer_files=files, fill=False)
    assert KVStore.open(store.path).tokenizer_files() == files
    (store.path / "tokenizer" / "special_tokens_map.json" / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"special_tokens_map\.json"):
        KVStore.open(store.path).tokenizer_files()


def test_a_store_without_a_tokenizer_opens(make_store: MakeStore) -> None:
    store, _ = make_store([1], fill=False)
    assert KVStore.open(store.path).tokenizer_files() == {}


def test_extraction_costs_add_up_and_are_not_part_of_the_identity(make_store: MakeStore) -> None:
    store, _ = make_store([1], fill=False)
    assert store.extraction["tokens"] == 0
    store.add_extraction(1.5, 10, "cpu", None)
    store.add_extraction(2.0, 5, "cuda:0", 8)
    again = KVStore.open(store.path)
    assert (
        again.extraction
        == store.extraction
        == {
            **{"seconds": 3.5, "tokens": 15},
            **{"device": "cuda:0", "batch_size": 8},
        }
    )
    assert again.manifest.hash == store.manifest.hash


@pytest.mark.parametrize(("samples_per_shard", "shards"), [(1, 5), (2, 3), (3, 2), (5, 1), (50, 1)])
def test_shards_hold_about_the_bytes_asked_for(make_store: MakeStore, samples_per_shard: int, shards: int) -> None:
    store, _ = make_store([33, 5, 64, 1, 32], samples_per_shard=samples_per_shard, fill=False)
    assert store.num_shards == shards
    assert sorted(i for shard in range(shards) for i in store.shard_samples(shard)) == list(range(5))


# ---------------------------------------------------------------------- opening what is not a store


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"no KV store at .*/none\.zarr: .*found nothing\. Name another, or write one with"
    ):
        KVStore.open(tmp_path / "none.zarr")
    with pytest.raises(StoreError, match=r"found a folder without zarr\.json"):
        KVStore.open(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"zarr_format": 3, "node_type": "group"}'])
def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match="is not a KV store, or its metadata is damaged"):
        KVStore.open(tmp_path)


def test_an_array_and_a_foreign_group_are_refused(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "array", shape=(1,), dtype="int8")
    zarr.create_group(tmp_path / "group", attributes={"kvpipe": "elsewhere"})
    for name in ("array", "group"):
        with pytest.raises(StoreError, match="is not a KV store"):
            KVStore.open(tmp_path / name)


def paths_into(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a JSON document."""
    items: Any = ()
    if isinstance(document, dict | list):
        items = document.items() if isinstance(document, dict) else enumerate(document)
    return [path, *(deeper for key, value in items for deeper in paths_into(value, (*path, key)))]


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    document = deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return document


@pytest.mark.parametrize("name", ["zarr.json", "kv/zarr.json"])
def test_damaged_metadata_is_a_store_error_or_harmless(make_store: MakeStore, name: str) -> None:
    """Every value of the metadata, deleted and replaced: no traceback of a library, no other KV."""
    store, kv = make_store([5, 33], num_layers=1, num_kv_heads=1, head_dim=1, samples_per_shard=1)
    file = store.path / name
    original = file.read_text()
    document = json.loads(original)
    refused = 0
    for path in paths_into(document)[1:]:
        for value in (..., None, 0, "x", []):
            file.write_text(json.dumps(with_value(document, path, value)))
            try:
                found = KVReader(KVStore.open(store.path)).read([1, 0], 64)
                assert torch.equal(found, kv[:, :, [1, 0]]), f"{path} = {value} changes the KV"
            except StoreError:
                refused += 1
    assert refused > 50
    file.write_text(original)
    assert torch.equal(KVReader(KVStore.open(store.path)).read([1, 0], 64), kv[:, :, [1, 0]])


def test_another_logical_dtype_is_refused(make_store: MakeStore) -> None:
    store, _ = make_store([5])
    file = store.path / "kv" / "zarr.json"
    file.write_text(file.read_text().replace('"bfloat16"', '"float16"'))
    with pytest.raises(StoreError, match=r"kv/zarr\.json has .* bytes instead of"):
        KVStore.open(store.path)


@pytest.mark.parametrize(
    ("field", "value", "kind"), [("codec", "int1", "codec"), ("eviction", "newest", "eviction policy")]
)
def test_what_only_a_newer_version_knows_is_refused(make_store: MakeStore, field: str, value: str, kind: str) -> None:
    store, _ = make_store([5, 9])
    group = zarr.open_group(store.path, mode="r+")
    attributes = dict(group.attrs[ATTRIBUTE])  # type: ignore[arg-type]
    group.attrs[ATTRIBUTE] = seal({**attributes, "manifest": {**attributes["manifest"], field: value}})
    said = (
        f"{re.escape(str(store.path))} has an unknown {kind}: expected .* found {value}. Read it with the kvpipe that"
    )
    with pytest.raises(StoreError, match=said):
        KVStore.open(store.path)


def test_a_failed_creation_leaves_nothing(make_store: MakeStore, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = set(tmp_path_factory.getbasetemp().iterdir())
    with pytest.raises(ValueError, match="null"):
        make_store([5], tokenizer_files={"good.json": b"{}", "bad\0.json": b"{}"})
    (folder,) = (path for path in set(tmp_path_factory.getbasetemp().iterdir()) - before if not path.is_symlink())
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------------- ledger


def test_only_the_ledger_says_what_is_finished(make_store: MakeStore) -> None:
    store, _ = make_store([5, 40, 33, 2, 1], fill=False)
    for shard in range(3):
        store.shard_path(shard).parent.mkdir(parents=True)
        store.shard_path(shard).write_bytes(b"a shard without an entry")
    assert store.finished_shards() == set()
    own = [np.array(rows)[:, None] for rows in ([[1, -1], [2, 3]], [[1, 2], [0, -1]], [[1, -1], [-1, -1]])]
    for other in (own[0], own[2]):
        store.ledger.record(1, other)
        assert store.finished_shards() == set(), "the entry of a shard with other lengths"
    store.ledger.record(1, own[1])
    assert store.finished_shards() == {1}
    assert not store.complete
    assert np.array_equal(store.ledger.checksums(1), own[1])
    with pytest.raises(StoreError, match=r"incomplete: expected 3 shards, found 1\. Run the same `kvpipe extract`"):
        store.require_complete()
    store.ledger.record(0, own[0])
    store.ledger.record(2, own[2])
    store.require_complete()
    assert KVStore.open(store.path).complete
    store.shard_path(2).unlink()
    assert store.finished_shards() == {0, 1}, "an entry without its shard counts no more than a shard without entry"
    store.ledger.path(0).write_bytes(b"damaged")
    assert store.finished_shards() == {1}


def test_a_missing_entry_is_named(make_store: MakeStore) -> None:
    store, _ = make_store([5, 40, 33], fill=False)
    with pytest.raises(StoreError, match=r"shard 1 of .* is not in the ledger.*found none"):
        store.ledger.checksums(1)


def test_every_flipped_bit_of_an_entry_is_seen(make_store: MakeStore) -> None:
    store, _ = make_store([5, 40])
    entry = store.path / "ledger" / "c" / "0" / "0"
    whole = entry.read_bytes()
    flips = [whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in range(8)]
    for content in [*flips, whole[:-1], whole + b"\0", b""]:
        entry.write_bytes(content)
        with pytest.raises(StoreError, match=r"shard 0 .* its entry is damaged"):
            store.ledger.checksums(0)
