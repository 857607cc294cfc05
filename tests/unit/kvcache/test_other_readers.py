"""Every array of a store is plain Zarr: zarr-python, zarrs and tensorstore read the same from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from kvpipe.kvcache.store import KVStore
from numpy.typing import NDArray

LENGTHS = [70, 5, 32, 33, 1]
STORES: dict[str, dict[str, Any]] = {
    "raw": {},
    "float16": {"dtype": torch.float16},
    "int4": {"codec": "int4"},
    "fp8": {"codec": "fp8"},
    "evicted": {"kept": [33, 2, 10, 0, 1]},
    "int3": {"codec": "int3", "head_dim": 8},
    "int2, evicted": {"codec": "int2", "kept": [33, 2, 10, 0, 1]},
    "queries": {"query_heads": 4},
    "fp8, evicted, queries": {"codec": "fp8", "kept": [33, 2, 10, 0, 1], "query_heads": 2},
}


def by_zarr_python(store: KVStore, name: str) -> NDArray[Any]:
    return np.asarray(zarr.open_array(store.path / name, mode="r")[...])


def by_zarrs(store: KVStore, name: str) -> NDArray[Any]:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return np.asarray(zarr.open_array(store.path / name, mode="r")[...])


def by_tensorstore(store: KVStore, name: str) -> NDArray[Any]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.path / name)}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


@pytest.mark.parametrize("options", STORES.values(), ids=list(STORES))
def test_three_readers_agree_on_every_array(
    make_store: Callable[..., tuple[KVStore, torch.Tensor]], options: dict[str, Any]
) -> None:
    store, kv = make_store(LENGTHS, **options)
    names = [*store.parts, "ledger", *store.side_arrays]
    assert {"kv", "ledger", "length", "input_ids", "text"} <= set(names)
    assert ("kv_scale" in names, "kv_position" in names) == ("codec" in options, "kept" in options)
    assert ("queries" in names) == ("query_heads" in options)
    for name in names:
        expected = by_zarr_python(store, name)
        for found in (by_zarrs(store, name), by_tensorstore(store, name)):
            assert found.shape == expected.shape, name
            assert found.tobytes() == expected.tobytes(), name
    if not store.lossy:
        own = kv.view(torch.uint16) if kv.dtype == torch.bfloat16 else kv
        assert by_zarr_python(store, "kv").tobytes() == own.numpy().tobytes()
    if "kept" in options:
        for sample, kept in enumerate(options["kept"]):
            assert by_zarr_python(store, "kv_position")[sample, :kept].tolist() == [2 * k + 1 for k in range(kept)]
