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


@pytest.fixture(scope="module")
def golden(root: Path) -> Path:
    return root / "tests" / "golden"


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((golden / "expected.json").read_text())
    return document


def sha256(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).astype("<u2").tobytes()).hexdigest()


def test_the_reader_reads_it(golden: Path, expected: dict[str, Any]) -> None:
    store = KVStore.open(golden / "store.zarr")
    kv = KVReader(store).read(range(3), 64)
    assert list(kv.shape) == expected["shape"]
    assert kv.dtype == torch.bfloat16
    assert sha256(kv.view(torch.uint16).numpy()) == expected["kv_sha256"]
    assert {index: kv[index].item() for index in LITERALS} == LITERALS
    assert store.manifest.hash == expected["manifest_hash"]


def test_zarr_python_and_tensorstore_read_it(golden: Path, expected: dict[str, Any]) -> None:
    by_zarr = np.asarray(zarr.open_group(golden / "store.zarr", mode="r")["kv"][...])
    kvstore = {"driver": "file", "path": str(golden / "store.zarr" / "kv")}
    by_tensorstore = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
    for array in (by_zarr, by_tensorstore):
        assert array.dtype == np.uint16
        assert sha256(array) == expected["kv_sha256"]
        as_floats = (array.astype(np.uint32) << 16).view(np.float32)
        assert {index: float(as_floats[index]) for index in LITERALS} == LITERALS


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
    fresh = script["write_golden_store"](tmp_path / "store.zarr")
    assert script["describe"](fresh) == expected
    assert len(expected["files"]) == 4
    for name in expected["files"]:
        assert (fresh.path / name).read_bytes() == (golden / "store.zarr" / name).read_bytes()
    for name in ("kv/zarr.json", "ledger/zarr.json"):
        written, committed = (json.loads((path / name).read_text()) for path in (fresh.path, golden / "store.zarr"))
        assert written == committed


def test_it_stays_small(golden: Path) -> None:
    sizes = [path.stat().st_size for path in golden.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(sizes) < 60_000
