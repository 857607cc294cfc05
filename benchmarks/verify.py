"""`kvpipe verify` of a clean store of 1 GB over plain reading of its files, both warm. Aim: <= 1.5."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.verify import require_side_arrays, verify_shards
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from side_by_side import HEADER, Ratio, alternate, quiet, ratio

SAMPLES, RUNS = 7000, 5


def measure(runs: int = RUNS) -> list[Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.zarr"
        extract(ExtractConfig("qwen", path, samples=SAMPLES), quiet())
        rounds = alternate({"verify": lambda: _verify(path), "read": lambda: _read(path)}, runs)
    return [ratio("verify / reading every file", rounds, "verify", "read", aim=1.5)]


def _verify(path: Path) -> float:
    start = time.perf_counter()
    store = KVStore.open(path)
    require_side_arrays(store)
    assert not any(verify_shards(store))
    return time.perf_counter() - start


def _read(path: Path) -> float:
    files = [file for file in path.rglob("*") if file.is_file()]
    buffer = np.empty(max(file.stat().st_size for file in files), np.uint8)
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as raw:
            raw.readinto(buffer.data)
    return time.perf_counter() - start


if __name__ == "__main__":
    print(HEADER, *(found.row for found in measure()), sep="\n")  # noqa: T201
