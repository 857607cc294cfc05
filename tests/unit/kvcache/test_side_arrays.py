"""Tokens, text and tokenizer come back whole or not at all: no flipped bit, no missing chunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache import side_arrays
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.padded_rows import PaddedRows
from kvpipe.kvcache.side_arrays import add_array, read_array, read_rows
from numpy.typing import NDArray


def new_group(path: Path) -> zarr.Group:
    return zarr.create_group(path, zarr_format=3)


@pytest.mark.parametrize(
    "data",
    [
        np.arange(24, dtype=np.int32).reshape(4, 3, 2),
        np.zeros((5, 2), np.int8),
        np.frombuffer(b"\x00any bytes\xff", np.uint8),
        np.empty(0, np.uint8),
    ],
    ids=["int32", "zeros", "bytes", "empty"],
)
def test_arrays_read_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: NDArray[np.generic]) -> None:
    monkeypatch.setattr(side_arrays, "CHUNK_BYTES", 16)  # several chunks
    names = ("a", "b", "c")[: data.ndim]
    checksum = add_array(new_group(tmp_path), "file.json", data, names)
    found = read_array(zarr.open_group(tmp_path, mode="r"), "file.json", checksum, data.shape)
    assert found.dtype == data.dtype
    assert np.array_equal(found, data)
    kvstore = {"driver": "file", "path": str(tmp_path / "file.json")}
    other = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    assert np.array_equal(other.read().result(), data)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_padded_rows_are_the_array_that_is_never_made(lengths: list[int], first: int, end: int, flat: bool) -> None:
    items = np.arange(2 * sum(lengths), dtype=np.int32).reshape(-1, 2)
    items = items[:, 0] if flat else items
    whole, place = np.full((len(lengths), 6, *items.shape[1:]), -1, np.int32), 0
    for row, length in enumerate(lengths):
        whole[row, :length] = items[place : place + length]
        place += length
    rows = PaddedRows(items, np.array(lengths, np.int32), width=6, fill=-1)
    assert (rows.shape, rows.dtype, len(rows)) == (whole.shape, whole.dtype, len(whole))
    assert np.array_equal(rows[first:end], whole[first:end])
    copy = PaddedRows(np.zeros_like(items), rows.length, rows.width, rows.fill)
    for start in range(0, len(rows), 2):
        copy[start : start + 2] = whole[start : start + 2]
    assert np.array_equal(copy.items, items)


def test_rows_in_any_order_are_padded_to_the_longest_of_them() -> None:
    rows = PaddedRows(np.arange(14, dtype=np.int32), np.array([3, 1, 4, 0, 6], np.int32), width=7, fill=-1)
    assert rows.take([2, 0, 3, 2]).tolist() == [[4, 5, 6, 7], [0, 1, 2, -1], [-1, -1, -1, -1], [4, 5, 6, 7]]
    assert rows.take([1]).tolist() == [[3]]


@pytest.mark.parametrize("chunk_bytes", [16, 64, 2**22])
def test_padded_rows_are_written_as_the_array_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(side_arrays, "CHUNK_BYTES", chunk_bytes)
    rows = PaddedRows(np.arange(14, dtype=np.int32), np.array([3, 1, 4, 0, 6], np.int32), width=7)
    group = new_group(tmp_path)
    checksum = add_array(group, "rows", rows, ("sample", "token"))
    assert checksum == add_array(group, "whole", rows[:5], ("sample", "token"))
    assert np.array_equal(read_array(group, "rows", checksum, (5, 7)), rows[:5])
    found = read_rows(zarr.open_group(tmp_path, mode="r"), "rows", checksum, rows.length, 7)
    assert np.array_equal(found.items, rows.items)
    with pytest.raises(StoreError, match="its content fails its checksum"):
        read_rows(group, "rows", checksum + 1, rows.length, 7)
    with pytest.raises(StoreError, match=r"an array of \(5, 7\) instead of \(5, 8\)"):
        read_rows(group, "rows", checksum, rows.length, 8)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert files
    assert all((tmp_path / "rows" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes() for file in files)


@pytest.mark.parametrize("data", [np.arange(40, dtype=np.int32), np.zeros(40, np.int32)], ids=["numbers", "zeros"])
def test_every_flipped_bit_and_every_missing_chunk_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: NDArray[np.int32]
) -> None:
    monkeypatch.setattr(side_arrays, "CHUNK_BYTES", 80)
    checksum = add_array(new_group(tmp_path), "x", data, ("i",))
    group = zarr.open_group(tmp_path, mode="r")
    chunk = tmp_path / "x" / "c" / "1"
    whole = chunk.read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    for content in [*damaged, whole[:-1], b""]:
        chunk.write_bytes(content)
        with pytest.raises(StoreError, match=r"x in .* is damaged"):
            read_array(group, "x", checksum)
    chunk.unlink()
    with pytest.raises(StoreError, match="1 of 2 chunks are missing"):
        read_array(group, "x", checksum)


def test_chunks_in_each_others_place_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are whole and valid by their own checksums."""
    monkeypatch.setattr(side_arrays, "CHUNK_BYTES", 80)
    checksum = add_array(new_group(tmp_path), "x", np.arange(40, dtype=np.int32), ("i",))
    first, second = (tmp_path / "x" / "c" / name for name in "01")
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(StoreError, match="its content fails its checksum"):
        read_array(zarr.open_group(tmp_path, mode="r"), "x", checksum)


def test_missing_arrays_groups_and_shapes_are_refused(tmp_path: Path) -> None:
    group = new_group(tmp_path)
    group.create_group("inner")
    checksum = add_array(group, "x", np.arange(3), ("i",))
    with pytest.raises(StoreError, match="KeyError"):
        read_array(group, "nothing", checksum)
    with pytest.raises(StoreError, match="inner is not an array"):
        read_array(group, "inner", checksum)
    with pytest.raises(StoreError, match=r"an array of \(3,\) instead of \(4,\)"):
        read_array(group, "x", checksum, (4,))
