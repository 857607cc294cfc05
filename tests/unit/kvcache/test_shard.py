"""The bytes of a shard are what Zarr says they are, and no damage to them goes unseen."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.layout import STORAGE_DTYPES, dtype_name
from kvpipe.kvcache.shard import (
    CRC_BYTES,
    EMPTY,
    NO_CHUNK,
    ShardFile,
    ShardLayout,
    crc32c,
    read_index,
    require_checksums,
    sample_starts,
)
from kvpipe.kvcache.store import KVStore
from numpy.typing import NDArray

DTYPES = [np.dtype(dtype).newbyteorder("<") for dtype in STORAGE_DTYPES.values()]
BLOCK = 4


def small_layout(samples: int = 3, dtype: np.dtype[Any] = DTYPES[2]) -> ShardLayout:
    return ShardLayout((1, 2, 1, 1, BLOCK, 2), dtype, BLOCK, samples, blocks=2)


def random_sample(layout: ShardLayout, length: int, seed: int) -> NDArray[Any]:
    """Random bits `[L, 2, H, T, D]`, NaNs among them; no chunk is all zeros."""
    num_layers, kinds, _, heads, _, head_dim = layout.chunk_shape
    shape = (num_layers, kinds, heads, length, head_dim * layout.dtype.itemsize)
    return np.random.default_rng(seed).integers(1, 256, shape, dtype=np.uint8).view(layout.dtype)


def records(layout: ShardLayout, sample: NDArray[Any]) -> list[NDArray[np.uint8]]:
    """A sample as it is staged: its chunks, zero past its end, with rubbish where the checksums belong."""
    out = np.full((layout.blocks_of(sample.shape[3]), layout.record_bytes), 0xAA, np.uint8)
    for blk, record in enumerate(out):
        part = sample[:, :, :, blk * layout.block : (blk + 1) * layout.block]
        chunk = record[: layout.chunk_bytes].view(layout.dtype).reshape(layout.chunk_shape)
        chunk[:] = 0
        chunk[:, :, 0, :, : part.shape[3]] = part
    return [out]


def build(layout: ShardLayout, lengths: list[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[NDArray[Any]]]:
    samples = [random_sample(layout, length, seed) for seed, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        file = ShardFile([path], [layout], np.array(lengths))
        for row, sample in enumerate(samples):
            file.add(row, records(layout, sample))
        checksums = file.finish()
        assert path.stat().st_size == file.nbytes
        return np.fromfile(path, np.uint8), checksums, samples


def read(data: NDArray[np.uint8], layout: ShardLayout, checksums: NDArray[np.int64], row: int, length: int) -> bytes:
    """A sample's bytes, read the way KVReader does."""
    blocks = layout.blocks_of(length)
    if blocks == 0:
        return b""
    start = sample_starts(read_index(data, layout), layout)[row]
    if start < 0 or start + blocks * layout.record_bytes > len(data):
        raise ValueError("token blocks are missing or misplaced")
    own = data[start : start + blocks * layout.record_bytes].reshape(blocks, layout.record_bytes)
    require_checksums(own, layout, checksums[row, 0, :blocks].tolist())
    chunks = own[:, : layout.chunk_bytes].copy().view(layout.dtype).reshape(blocks, *layout.chunk_shape)
    return np.concatenate([chunk[:, :, 0] for chunk in chunks], axis=3).tobytes()


def padded(layout: ShardLayout, sample: NDArray[Any]) -> bytes:
    missing = -sample.shape[3] % layout.block
    return np.pad(sample, [(0, 0), (0, 0), (0, 0), (0, missing), (0, 0)]).tobytes()


@given(
    lengths=st.lists(st.integers(0, 2 * BLOCK), min_size=1, max_size=4),
    unused=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
)
def test_samples_of_every_length_read_back(lengths: list[int], unused: int, dtype: np.dtype[Any]) -> None:
    layout = small_layout(len(lengths) + unused, dtype)
    data, checksums, samples = build(layout, lengths)
    for row, (length, sample) in enumerate(zip(lengths, samples, strict=True)):
        assert read(data, layout, checksums, row, length) == padded(layout, sample)


@given(lengths=st.lists(st.integers(0, 2 * BLOCK), min_size=1, max_size=4), unused=st.integers(0, 2))
def test_empty_chunks_take_no_space(lengths: list[int], unused: int) -> None:
    layout = small_layout(len(lengths) + unused)
    data, checksums, _ = build(layout, lengths)
    blocks = [layout.blocks_of(length) for length in lengths] + [0] * unused
    assert len(data) == sum(blocks) * layout.record_bytes + layout.index_bytes
    full = np.arange(layout.blocks)[None] < np.array(blocks)[:, None]
    index = read_index(data, layout)
    assert np.all(index[~full] == EMPTY)
    assert np.all(checksums[:, 0][~full] == NO_CHUNK)
    # The chunks of a sample follow each other: one range holds them.
    assert index[full].tolist() == [[i * layout.record_bytes, layout.record_bytes] for i in range(sum(blocks))]


def test_samples_may_come_in_any_order(tmp_path: Path) -> None:
    layout, lengths = small_layout(), [3, 8, 5]
    expected, _, samples = build(layout, lengths)
    file = ShardFile([tmp_path / "shard"], [layout], np.array(lengths))
    for left, row in ((2, 1), (1, 2), (0, 0)):
        file.add(row, records(layout, samples[row]))
        assert file.remaining == left
        assert not (tmp_path / "shard").exists()
    file.finish()
    assert (tmp_path / "shard").read_bytes() == expected.tobytes()


def test_a_sample_that_comes_twice_does_not_stand_for_another(tmp_path: Path) -> None:
    layout = small_layout()
    file = ShardFile([tmp_path / "shard"], [layout], np.array([4, 4]))
    file.add(0, records(layout, random_sample(layout, 4, 0)))
    file.add(0, records(layout, random_sample(layout, 4, 0)))
    assert file.remaining == 1
    file.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(2, 20), (1, 19), (0, 20)])
def test_records_that_do_not_fit_are_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    file = ShardFile([tmp_path / "shard"], [small_layout()], np.array([4]))
    with pytest.raises(ValueError, match=r"do not fit the shard: expected \(1, 36\), found"):
        file.add(0, [np.zeros(shape, np.uint8)])
    assert file.remaining == 1
    file.discard()


# ---------------------------------------------------------------------- other readers


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("lengths", [[1, 31, 32], [33, 63, 64, 2], [96, 5]], ids=str)
def test_zarr_python_and_tensorstore_read_the_same(
    make_store: Callable[..., tuple[KVStore, torch.Tensor]], lengths: list[int], dtype: torch.dtype
) -> None:
    store, kv = make_store(lengths, dtype=dtype, samples_per_shard=2)
    expected = (kv.view(torch.uint16) if dtype == torch.bfloat16 else kv).numpy()
    by_zarr = zarr.open_array(store.path / "kv", mode="r")
    by_tensorstore = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.path / "kv")}}
    ).result()
    assert by_zarr.metadata.dimension_names == ("layer", "kv", "sample", "head", "token", "channel")
    assert np.asarray(by_zarr[...]).tobytes() == expected.tobytes()
    assert by_tensorstore.read().result().tobytes() == expected.tobytes()


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    samples_per_shard=st.integers(1, 3),
    dtype=st.sampled_from(list(STORAGE_DTYPES)),
)
def test_any_store_reads_the_same_in_zarr_python(
    make_store: Callable[..., tuple[KVStore, torch.Tensor]],
    lengths: list[int],
    samples_per_shard: int,
    dtype: torch.dtype,
) -> None:
    store, kv = make_store(lengths, dtype=dtype, samples_per_shard=samples_per_shard, num_layers=1, head_dim=1)
    array = zarr.open_array(store.path / "kv", mode="r")
    assert np.asarray(array[...]).tobytes() == kv.contiguous().view(torch.uint8).numpy().tobytes()


def test_the_metadata_is_plain_zarr_v3(make_store: Callable[..., tuple[KVStore, torch.Tensor]]) -> None:
    store, _ = make_store([40, 5])
    document = json.loads((store.path / "kv" / "zarr.json").read_text())
    sharding = document["codecs"][0]
    assert document["data_type"] == "uint16"
    assert document["attributes"]["logical_dtype"] == "bfloat16"
    assert sharding["name"] == "sharding_indexed"
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]
    assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]


# ---------------------------------------------------------------------- damage


def test_every_flipped_bit_is_seen() -> None:
    """A flip in a chunk's own checksum is the one that changes no data: there the ledger's copy counts."""
    layout, lengths = small_layout(), [3, 8]
    data, checksums, samples = build(layout, lengths)
    own_checksums = [i * layout.record_bytes + layout.chunk_bytes + byte for i in range(3) for byte in range(CRC_BYTES)]
    for bit in range(len(data) * 8):
        damaged = data.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        seen = []
        for row, (length, sample) in enumerate(zip(lengths, samples, strict=True)):
            try:
                assert read(damaged, layout, checksums, row, length) == padded(layout, sample)
            except ValueError:
                seen.append(row)
        index_starts = 3 * layout.record_bytes
        if bit // 8 >= index_starts:
            assert seen == [0, 1]
        elif bit // 8 in own_checksums:
            assert seen == []
        else:
            assert seen == [0 if bit // 8 < layout.record_bytes else 1]


def test_zarr_python_sees_every_flipped_byte_too(make_store: Callable[..., tuple[KVStore, torch.Tensor]]) -> None:
    store, _ = make_store([2], num_layers=1, num_kv_heads=1, head_dim=1, samples_per_shard=1)
    path = store.shard_path(0)
    whole = path.read_bytes()
    for byte in range(len(whole)):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])
        with pytest.raises(ValueError, match=r"(?i)checksum|crc32c"):
            zarr.open_array(store.path / "kv", mode="r")[...]


def test_swapped_chunks_are_seen_through_the_ledger() -> None:
    """Both chunks are valid by their own checksums; only the ledger knows which belongs where."""
    layout, lengths = small_layout(), [4, 4]
    data, checksums, samples = build(layout, lengths)
    size = layout.record_bytes
    swapped = data.copy()
    swapped[:size], swapped[size : 2 * size] = data[size : 2 * size], data[:size]
    for row in range(2):
        with pytest.raises(ValueError, match="token block 0 fails its checksum"):
            read(swapped, layout, checksums, row, 4)
    assert read(swapped, layout, checksums[[1, 0, 2]], 0, 4) == padded(layout, samples[1])


def test_a_swapped_index_is_seen_through_the_ledger() -> None:
    layout = small_layout()
    data, checksums, _ = build(layout, [4, 4])
    forged = data.copy()
    index = read_index(forged, layout).copy()
    index[[0, 1]] = index[[1, 0]]
    forged[-layout.index_bytes : -CRC_BYTES] = index.reshape(-1).view(np.uint8)
    checksum = crc32c(forged[-layout.index_bytes : -CRC_BYTES])
    forged[-CRC_BYTES:] = np.frombuffer(checksum.to_bytes(4, "little"), np.uint8)
    assert np.array_equal(read_index(forged, layout), index)
    with pytest.raises(ValueError, match=r"misplaced|fails its checksum"):
        read(forged, layout, checksums, 0, 4)


def test_a_file_cut_anywhere_is_seen() -> None:
    layout = small_layout()
    data, checksums, _ = build(layout, [3, 8])
    for size in range(len(data)):
        with pytest.raises(ValueError, match=r"cannot hold an index|index fails its checksum"):
            read(data[:size], layout, checksums, 0, 3)


def test_an_empty_chunk_where_a_sample_belongs_is_seen() -> None:
    layout = small_layout()
    data, checksums, _ = build(layout, [3])
    with pytest.raises(ValueError, match=r"missing or misplaced|fails its checksum"):
        read(data, layout, checksums, 0, 8)
