"""The arrays beside the KV: checksummed as a whole, and read whole or not at all, a chunk at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from .errors import StoreError
from .padded_rows import PaddedRows
from .shard import crc32c

CHUNK_BYTES = 2**22

Room = TypeVar("Room", NDArray[Any], PaddedRows)


def add_array(group: zarr.Group, name: str, data: NDArray[Any] | PaddedRows, dimension_names: tuple[str, ...]) -> int:
    """Write an array in chunks of whole rows, one after the other; returns the checksum of its content.

    Every chunk is stored, zeros too: one that is missing is lost.
    """
    rows = max(1, min(len(data), CHUNK_BYTES // max(1, data[:1].nbytes)))
    with warnings.catch_warnings():
        # A file's name may hold a dot; every Zarr v3 reader takes it.
        warnings.simplefilter("ignore", UserWarning)
        array = group.create_array(
            name,
            shape=data.shape,
            chunks=(rows, *data.shape[1:]),
            dtype=data.dtype,
            compressors=[ZstdCodec(), Crc32cCodec()],
            dimension_names=dimension_names,
            config={"write_empty_chunks": True},
        )
    checksum = 0
    for first in range(0, len(data), rows):
        chunk = data[first : first + rows]
        array[first : first + rows] = chunk
        checksum = content_checksum(chunk, checksum)
    return checksum


def content_checksum(data: NDArray[Any], before: int = 0) -> int:
    """crc32c over an array's values in C order, or over these after others that have the checksum `before`."""
    return crc32c(np.ascontiguousarray(data).reshape(-1).view(np.uint8), before)


def read_array(group: zarr.Group, name: str, checksum: int, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    """A whole array, of `shape` if given. Raises StoreError where any of it is missing, damaged or not what
    `add_array` gave `checksum` for, as chunks in each other's place are."""
    return _read(group, name, checksum, shape, np.empty)


def read_rows(
    group: zarr.Group, name: str, checksum: int, length: NDArray[np.int32], width: int, fill: int = 0
) -> PaddedRows:
    """The same of an array of padded rows `[B, width]`, without the padding: one long row would make all others as
    long."""

    def room(shape: tuple[int, ...], dtype: np.dtype[Any]) -> PaddedRows:
        return PaddedRows(np.empty(int(length.sum(dtype=np.int64)), dtype), length, width, fill)

    return _read(group, name, checksum, (len(length), width), room)


def _read(
    group: zarr.Group,
    name: str,
    checksum: int,
    shape: tuple[int, ...] | None,
    room: Callable[[tuple[int, ...], np.dtype[Any]], Room],
) -> Room:
    try:
        array = open_array(group, name)
        if shape is not None and array.shape != shape:
            raise ValueError(f"an array of {array.shape} instead of {shape}")
        if array.nchunks_initialized != array.nchunks:
            raise ValueError(f"{array.nchunks - array.nchunks_initialized} of {array.nchunks} chunks are missing")
        data, found = room(array.shape, array.dtype), 0
        # Chunk by chunk: Zarr would hold all of them beside the whole.
        for first in range(0, len(data), array.chunks[0]):
            rows = slice(first, first + array.chunks[0])
            chunk = np.asarray(array[rows])
            found = content_checksum(chunk, found)
            data[rows] = chunk
        if found != checksum:
            raise ValueError("its content fails its checksum")
        return data
    except Exception as error:
        raise StoreError(
            f"{name} in {str(group.store_path).removeprefix('file://')} is damaged",
            expected="the array that kvpipe wrote",
            found=f"{type(error).__name__}: {error}".rstrip("."),
            remedy="Extract again into a new place",
        ) from error


def open_array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """An array of a group. Raises KeyError or TypeError where it is missing or a group."""
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise TypeError(f"{name} is not an array")
    return array
