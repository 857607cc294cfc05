"""Queries come back beside the KV of the same tokens, and KV comes back without them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache import chunk_reader
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.layout import STORAGE_DTYPES, dtype_name
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from torch import Tensor

MakeStore = Callable[..., tuple[KVStore, Tensor]]
RandomQueries = Callable[[KVStore], Tensor]
LENGTHS = [5, 40, 33, 2, 64, 32, 1, 63, 31, 65, 96]


def open_files() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - a pathlib iterator would count itself as well


@pytest.fixture(scope="module")
def with_queries(make_store: MakeStore) -> tuple[KVStore, Tensor]:
    return make_store(LENGTHS, samples_per_shard=3, query_heads=6)


@given(
    indices=st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=12),
    num_tokens=st.none() | st.integers(1, 120),
)
def test_any_queries_in_any_order(
    with_queries: tuple[KVStore, Tensor], random_queries: RandomQueries, indices: list[int], num_tokens: int | None
) -> None:
    """At the places of the KV that is read."""
    store, _ = with_queries
    reader = KVReader(store)
    found = reader.read_queries(indices, num_tokens)
    tokens = reader.read(indices, num_tokens).shape[4]
    expected = torch.nn.functional.pad(random_queries(store), (0, 0, 0, 120 - 96))[:, indices, :, :tokens]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_queries_are_exact_with_every_codec_and_dtype(
    make_store: MakeStore, random_queries: RandomQueries, codec: str, dtype: torch.dtype
) -> None:
    store, _ = make_store([5, 40, 33], codec=codec, dtype=dtype, query_heads=3)
    found = KVReader(KVStore.open(store.path)).read_queries([2, 0, 1], 64)
    assert torch.equal(found, random_queries(store)[:, [2, 0, 1]])


@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_queries_of_the_kept_tokens_lie_at_the_places_of_their_kv(
    make_store: MakeStore, random_queries: RandomQueries, codec: str
) -> None:
    kept = [33, 2, 10, 0, 1]
    store, _ = make_store([70, 5, 40, 33, 6], kept=kept, codec=codec, query_heads=4)
    reader, all_queries, chosen = KVReader(store), random_queries(store), [2, 4, 0, 1]
    queries = reader.read_queries(chosen)
    _, positions = reader.read_with_positions(chosen)
    assert positions is not None
    assert queries.shape == (2, 4, 4, 33, 4)
    for row, sample in enumerate(chosen):
        places = positions[row, : kept[sample]]
        assert torch.equal(queries[:, row, :, : kept[sample]], all_queries[:, sample, :, places])
        assert not queries[:, row, :, kept[sample] :].any()


@pytest.mark.parametrize("options", [{}, {"codec": "int4"}, {"kept": [2, 30, 17]}], ids=["raw", "int4", "evicted"])
def test_reading_kv_touches_no_queries_and_gives_the_same(make_store: MakeStore, options: dict[str, Any]) -> None:
    """What the queries' files hold does not matter, and none of them is opened."""
    plain, _ = make_store([5, 64, 33], **options)
    store, _ = make_store([5, 64, 33], query_heads=4, **options)
    for shard in range(store.num_shards):
        store.shard_paths(shard)[-1].write_bytes(b"damaged")
    reader, before = KVReader(store), open_files()
    kv, positions = reader.read_with_positions([2, 0, 1])
    assert open_files() == before + 2 * (len(store.parts) - 1)
    expected, places = KVReader(plain).read_with_positions([2, 0, 1])
    assert torch.equal(kv, expected)
    assert (positions is None and places is None) or torch.equal(positions, places)
    with pytest.raises(StoreError, match=r"shard 0 of .* is damaged at sample 0"):
        reader.read_queries([0])


def test_queries_of_a_store_without_any_are_refused(make_store: MakeStore) -> None:
    with pytest.raises(StoreError, match=r"has no queries: expected .* found KV alone\. Extract again with --queries"):
        KVReader(make_store([5])[0]).read_queries([0])


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_of_a_query_is_refused(make_store: MakeStore, where: float) -> None:
    store, kv = make_store([5, 40, 33, 2, 64, 32], query_heads=4)
    path = store.shard_paths(1)[-1]
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 4
    path.write_bytes(data)
    reader = KVReader(store)
    with pytest.raises(StoreError, match=r"shard 1 of .* is damaged at sample [23].*checksum"):
        reader.read_queries([2, 3])
    assert torch.equal(reader.read([2, 3], 64), kv[:, :, [2, 3]])
    assert reader.read_queries([0, 1, 4, 5]).any()


def test_queries_and_kv_share_the_bound_on_open_files(
    with_queries: tuple[KVStore, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_reader, "OPEN_FILES", 4)
    before, reader = open_files(), KVReader(with_queries[0])
    for sample in (0, 3, 6, 9):
        reader.read([sample])
        reader.read_queries([sample])
    assert open_files() == before + 4
    reader.close()
    assert open_files() == before


def test_queries_of_another_shard_are_refused(make_store: MakeStore) -> None:
    store, _ = make_store([5, 40, 6, 41], query_heads=2)
    first, second = (store.shard_paths(shard)[-1] for shard in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    for sample in range(4):
        with pytest.raises(StoreError, match="fails its checksum"):
            KVReader(store).read_queries([sample])
