"""Any samples in any order come back as they were written, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache import chunk_reader
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.layout import STORAGE_DTYPES, dtype_name
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from torch import Tensor

MakeStore = Callable[..., tuple[KVStore, Tensor]]
LENGTHS = [5, 40, 33, 2, 64, 32, 1, 63, 31, 65, 96]


@pytest.fixture(scope="module")
def source(make_store: MakeStore) -> tuple[KVStore, Tensor]:
    return make_store(LENGTHS, samples_per_shard=3)


@pytest.fixture
def own_store(make_store: MakeStore) -> tuple[KVStore, Tensor]:
    """Six samples in three shards, to be damaged."""
    return make_store([5, 40, 33, 2, 64, 32])


def open_files() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - a pathlib iterator would count itself as well


@given(
    indices=st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=12),
    num_tokens=st.none() | st.integers(1, 120),
)
def test_any_samples_in_any_order(source: tuple[KVStore, Tensor], indices: list[int], num_tokens: int | None) -> None:
    store, kv = source
    found = KVReader(store).read(indices, num_tokens)
    expected_tokens = num_tokens or max(LENGTHS[i] for i in indices)
    expected = torch.nn.functional.pad(kv, (0, 0, 0, 120 - kv.shape[4]))[:, :, indices, :, :expected_tokens]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=dtype_name)
def test_every_dtype(make_store: MakeStore, dtype: torch.dtype) -> None:
    store, kv = make_store([5, 40, 33], dtype=dtype)
    found = KVReader(KVStore.open(store.path)).read([2, 0, 1])
    assert found.dtype == dtype
    assert torch.equal(found, kv[:, :, [2, 0, 1], :, :40])


@pytest.mark.parametrize(
    ("codec", "error"), [("fp8", 0.03), ("int8", 0.01), ("int4", 0.1), ("int3", 0.25), ("int2", 0.5)]
)
def test_every_lossy_codec(make_store: MakeStore, codec: str, error: float) -> None:
    """Near what was written, the same whatever is read with it, and zero past a sample's end."""
    store, kv = make_store(LENGTHS, samples_per_shard=3, codec=codec, head_dim=8, dtype=torch.float32)
    reader = KVReader(KVStore.open(store.path))
    found = reader.read(range(len(LENGTHS)), 96)
    assert found.shape == kv.shape
    assert (found - kv).norm() < error * kv.norm()
    for sample, length in enumerate(LENGTHS):
        assert not found[:, :, sample, :, length:].any()
    assert torch.equal(reader.read([4, 0, 10], 40), found[:, :, [4, 0, 10], :, :40])


def test_a_plain_zarr_user_can_decode_integers(make_store: MakeStore) -> None:
    """As docs/storage.md says."""
    store, _ = make_store(LENGTHS, codec="int4", head_dim=8)
    group, (sample, blk) = zarr.open_group(store.path, mode="r"), (4, 1)
    packed = np.asarray(group["kv"][:, :, sample, :, 32 * blk : 32 * blk + 32])
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(2, 2, 2, 32, 8).astype(np.float32)
    scales = np.asarray(group["kv_scale"][sample, blk], np.float32)
    by_channel, by_token = 2 * 2 * 8, 2 * 2 * 32
    key_span, key_least, value_span, value_least = np.split(scales, np.cumsum([by_channel, by_channel, by_token]))
    key = codes[:, 0] / 15 * key_span.reshape(2, 2, 1, 8) + key_least.reshape(2, 2, 1, 8)
    value = codes[:, 1] / 15 * value_span.reshape(2, 2, 32, 1) + value_least.reshape(2, 2, 32, 1)
    expected = KVReader(store).read([sample])[:, :, 0, :, 32:64].float()
    assert np.allclose(np.stack([key, value], axis=1), expected.numpy(), rtol=2**-7, atol=1e-5)


def test_positions_are_read_without_the_kv(make_store: MakeStore) -> None:
    store, _ = make_store([7, 64, 40, 2], kept=[3, 32, 1, 1])
    expected = KVReader(store).read_with_positions([1, 0, 3])[1]
    for shard in range(store.num_shards):
        store.shard_path(shard).write_bytes(bytes(store.shard_path(shard).stat().st_size))
    found = KVReader(store).read_positions([1, 0, 3])
    assert expected is not None
    assert torch.equal(found, expected)
    assert KVReader(make_store([7])[0]).read_positions([0]) is None


def test_what_was_read_stays_as_it_is(source: tuple[KVStore, Tensor]) -> None:
    """The reader reuses its buffers; what it hands out is the caller's."""
    store, kv = source
    reader = KVReader(store)
    first = reader.read([4])
    reader.read([10, 9, 8])
    assert torch.equal(first, kv[:, :, [4], :, :64])


def test_open_files_are_bounded_and_closed(source: tuple[KVStore, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_reader, "OPEN_FILES", 2)
    store, kv = source
    before = open_files()
    reader = KVReader(store)
    for indices in ([0, 3, 6, 9], [9, 6, 3, 0], [10, 0, 10, 0, 5]):
        assert torch.equal(reader.read(indices, 96), kv[:, :, indices])
        assert open_files() == before + 2
    reader.close()
    assert open_files() == before
    assert torch.equal(reader.read([0], 96), kv[:, :, [0]])
    assert open_files() == before + 1
    del reader
    assert open_files() == before


def test_samples_that_do_not_exist_are_refused(source: tuple[KVStore, Tensor]) -> None:
    reader = KVReader(source[0])
    with pytest.raises(IndexError):
        reader.read([len(LENGTHS)])
    with pytest.raises(StoreError):
        reader.read([-1])


# ---------------------------------------------------------------------- damage


def test_an_incomplete_store_is_refused(make_store: MakeStore) -> None:
    store, _ = make_store([5, 40, 33], fill=False)
    with pytest.raises(StoreError, match="incomplete: expected 2 shards, found 0"):
        KVReader(store)


def test_a_deleted_ledger_entry_is_refused(own_store: tuple[KVStore, Tensor]) -> None:
    store, _ = own_store
    reader = KVReader(store)
    (store.path / "ledger" / "c" / "1" / "0").unlink()
    with pytest.raises(StoreError, match="incomplete: expected 3 shards, found 2"):
        KVReader(store)
    with pytest.raises(StoreError, match=r"shard 1 .* is not in the ledger"):
        reader.read([2])


def test_a_deleted_shard_is_refused(own_store: tuple[KVStore, Tensor]) -> None:
    store, kv = own_store
    reader = KVReader(store)
    store.shard_path(1).unlink()
    with pytest.raises(StoreError, match="is incomplete"):
        KVReader(store)
    with pytest.raises(StoreError, match=r"shard 1 of .* is damaged at sample 3.*No such file"):
        reader.read([0, 3])
    assert torch.equal(reader.read([0, 5], 64), kv[:, :, [0, 5]])


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_is_refused(own_store: tuple[KVStore, Tensor], where: float) -> None:
    store, kv = own_store
    path = store.shard_path(1)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 4
    path.write_bytes(data)
    reader = KVReader(store)
    with pytest.raises(StoreError, match=r"shard 1 of .* is damaged at sample [23].*checksum"):
        reader.read([2, 3])
    assert torch.equal(reader.read([0, 1, 4, 5], 64), kv[:, :, [0, 1, 4, 5]])


def test_a_shard_cut_anywhere_is_refused(own_store: tuple[KVStore, Tensor]) -> None:
    store, _ = own_store
    path = store.shard_path(1)
    whole = path.read_bytes()
    files = open_files()
    for size in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError, match=r"shard 1 of .* is damaged at sample 2"):
            KVReader(store).read([2])
    assert open_files() == files


def test_a_shard_cut_while_it_is_open_is_refused(own_store: tuple[KVStore, Tensor]) -> None:
    store, _ = own_store
    reader = KVReader(store)
    reader.read([2])
    with store.shard_path(1).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(StoreError, match=r"the file ends .* bytes early"):
        reader.read([2])


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def test_swapped_shards_are_refused(make_store: MakeStore) -> None:
    store, _ = make_store([5, 40, 6, 41])  # two shards of the same size and the same index
    swap(store.shard_path(0), store.shard_path(1))
    for sample in range(4):
        with pytest.raises(StoreError, match="fails its checksum"):
            KVReader(store).read([sample])


def test_a_damaged_length_is_refused(own_store: tuple[KVStore, Tensor]) -> None:
    """Else a sample would come back shorter, or as zeros."""
    store, _ = own_store
    chunk = store.path / "length" / "c" / "0"
    chunk.unlink()
    with pytest.raises(StoreError, match=r"length in .* chunks are missing"):
        KVReader(KVStore.open(store.path)).read([0])
