"""The format on disk: a committed store reads the same for ever, and the same content gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore

# [layer, kv, sample, head, token, channel] -> ((index in C order * 37) % 251 - 125) / 8, worked out by hand.
LITERALS = {
    (0, 0, 0, 0, 0, 0): -15.625,
    (0, 0, 0, 0, 0, 1): -11.0,
    (0, 0, 0, 0, 4, 3): 9.5,
    (0, 0, 0, 0, 5, 0): 0.0,
    (0, 0, 1, 0, 63, 3): -13.625,
    (0, 1, 2, 1, 32, 2): -7.125,
    (1, 1, 2, 0, 32, 3): 0.875,
    (1, 1, 2, 0, 33, 0): 0.0,
}

# [layer, sample, head, token, channel] -> ((index in C order * 11) % 65 - 32) / 4, or 0 past the kept tokens.
QUERY_LITERALS = {
    (0, 0, 0, 0, 0): -8.0,
    (0, 0, 0, 0, 1): -5.25,
    (0, 0, 0, 2, 3): 6.0,
    (0, 0, 0, 3, 0): 0.0,
    (1, 2, 3, 16, 3): 4.5,
    (1, 2, 3, 17, 0): 0.0,
}


@pytest.fixture(scope="module")
def golden(root: Path) -> Path:
    return root / "tests" / "golden"


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((golden / "expected.json").read_text())
    return document


@pytest.fixture(scope="module")
def raw(expected: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = expected["store.zarr"]
    return found


def sha256(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).astype("<u2").tobytes()).hexdigest()


def test_the_reader_reads_it(golden: Path, raw: dict[str, Any]) -> None:
    store = KVStore.open(golden / "store.zarr")
    kv = KVReader(store).read(range(3), 64)
    assert list(kv.shape) == raw["shape"]
    assert kv.dtype == torch.bfloat16
    assert sha256(kv.view(torch.uint16).numpy()) == raw["kv_sha256"]
    assert {index: kv[index].item() for index in LITERALS} == LITERALS
    assert store.manifest.hash == raw["manifest_hash"]


def test_zarr_python_and_tensorstore_read_it(golden: Path, raw: dict[str, Any]) -> None:
    by_zarr = np.asarray(zarr.open_group(golden / "store.zarr", mode="r")["kv"][...])
    kvstore = {"driver": "file", "path": str(golden / "store.zarr" / "kv")}
    by_tensorstore = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
    for array in (by_zarr, by_tensorstore):
        assert array.dtype == np.uint16
        assert sha256(array) == raw["kv_sha256"]
        as_floats = (array.astype(np.uint32) << 16).view(np.float32)
        assert {index: float(as_floats[index]) for index in LITERALS} == LITERALS


def test_the_lossy_one_reads_the_same(golden: Path, expected: dict[str, Any], raw: dict[str, Any]) -> None:
    store = KVStore.open(golden / "lossy.zarr")
    kv, positions = KVReader(store).read_with_positions(range(3), 64)
    assert positions is not None
    assert positions[0].tolist() == [0, 1, 2, *[-1] * 61]
    assert store.kv_length.tolist() == [3, 32, 17]
    assert sha256(kv.contiguous().view(torch.uint16).numpy()) == expected["lossy.zarr"]["kv_sha256"]
    assert expected["lossy.zarr"]["kv_sha256"] != raw["kv_sha256"]
    queries = KVReader(store).read_queries(range(3), 64)
    assert sha256(queries.contiguous().view(torch.uint16).numpy()) == expected["lossy.zarr"]["queries_sha256"]
    assert {index: queries[index].item() for index in QUERY_LITERALS} == QUERY_LITERALS
    # 15 steps over a group's span, which is 32 at most.
    for index, value in LITERALS.items():
        kept = index[4] < store.kv_length[index[2]]
        assert kv[index].item() == pytest.approx(value, abs=32 / 15 / 2 + 0.1) if kept else kv[index].item() == 0


def test_tokens_text_and_tokenizer_read_the_same(golden: Path) -> None:
    store = KVStore.open(golden / "store.zarr")
    assert store.length.tolist() == [5, 64, 33]
    assert store.input_ids[2, 31:34].tolist() == [63, 64, 0]
    assert store.segment_ids[0, 2:6].tolist() == [2, 0, 1, -1]
    assert store.indices("test").tolist() == [2]
    assert store.records[1]["prompt"] == "naïve \U0001f98a\u2028 text"
    assert store.records[2]["prompt"] == "half a pair: \ud83e"
    assert store.tokenizer_files() == {"tokenizer.json": b'{"model": null}\n', "vocab.bin": bytes(range(8))}
    assert store.truncated == 1


def test_the_same_content_gives_the_same_bytes(golden: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    script = runpy.run_path(str(golden / "make_golden.py"))
    for store, is_lossy in script["STORES"].items():
        fresh = script["write_golden_store"](tmp_path / store, lossy=is_lossy)
        assert script["describe"](fresh) == expected[store]
        assert len(expected[store]["files"]) == (10 if is_lossy else 4)
        for name in expected[store]["files"]:
            assert (fresh.path / name).read_bytes() == (golden / store / name).read_bytes()
        for name in (*fresh.parts, "ledger"):
            written, committed = (
                json.loads((path / name / "zarr.json").read_text()) for path in (fresh.path, golden / store)
            )
            assert written == committed


def test_it_stays_small(golden: Path) -> None:
    sizes = [path.stat().st_size for path in golden.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(sizes) < 100_000
