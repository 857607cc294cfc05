"""The small arrays beside the KV: written whole, checksummed, read whole or not at all."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from .errors import StoreError
from .shard import crc32c

CHUNK_BYTES = 2**22


def add_array(group: zarr.Group, name: str, data: NDArray[Any], dimension_names: tuple[str, ...]) -> int:
    """Write an array in chunks of whole rows; returns the checksum of its content.

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
    array[...] = data
    return content_checksum(data)


def content_checksum(data: NDArray[Any]) -> int:
    """crc32c over an array's values in C order."""
    return crc32c(np.ascontiguousarray(data).reshape(-1).view(np.uint8))


def read_array(group: zarr.Group, name: str, checksum: int, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    """A whole array, of `shape` if given. Raises StoreError where any of it is missing, damaged or not what
    `add_array` gave `checksum` for, as chunks in each other's place are."""
    try:
        array = open_array(group, name)
        if shape is not None and array.shape != shape:
            raise ValueError(f"an array of {array.shape} instead of {shape}")
        if array.nchunks_initialized != array.nchunks:
            raise ValueError(f"{array.nchunks - array.nchunks_initialized} of {array.nchunks} chunks are missing")
        data = np.asarray(array[...])
        if content_checksum(data) != checksum:
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
