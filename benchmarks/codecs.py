"""What each codec costs beside raw KV: bytes, extraction, reading of batches, and how far from raw it comes back.

Every codec's figures are ratios to the raw store of the same samples, round by round. Errors are norms of the
difference over norms of the raw KV.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from kvpipe.kvcache.codec import CODECS
from kvpipe.kvcache.create import stored_bytes
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from side_by_side import alternate, of_values, quiet

RUNS = 3
BATCH_SIZE = 16
HEADER = "| codec | bytes | extraction | reading batches | error of keys | error of values |\n|---|---|---|---|---|---|"


def measure(samples: int = 1000, runs: int = RUNS) -> list[str]:
    """A Markdown row for every codec."""
    with tempfile.TemporaryDirectory() as folder:
        configs = {
            name: ExtractConfig("qwen", Path(folder) / f"{name}.zarr", samples=samples, codec=name) for name in CODECS
        }
        writing = alternate({name: _extraction(config) for name, config in configs.items()}, runs)
        stores = {name: KVStore.open(config.store) for name, config in configs.items()}
        reading = alternate({name: _reading(store) for name, store in stores.items()}, runs)
        rows = []
        for name, store in stores.items():
            size = _size(store) / _size(stores["raw"])
            costs = [of_values(name, [r[name] / r["raw"] for r in rounds], aim=1) for rounds in (writing, reading)]
            cells = [f"{size:.3f}", *(f"{c.median:.2f} ({c.low:.2f}-{c.high:.2f})" for c in costs)]
            cells += [f"{error:.4f}" for error in _errors(store, stores["raw"])]
            rows.append(f"| {name} | {' | '.join(cells)} |")
        return rows


def _extraction(config: ExtractConfig) -> Callable[[], float]:
    def run() -> float:
        shutil.rmtree(config.store, ignore_errors=True)
        return extract(config, quiet()).seconds

    return run


def _reading(store: KVStore) -> Callable[[], float]:
    reader, samples = KVReader(store), store.num_samples
    batches = [range(start, min(start + BATCH_SIZE, samples)) for start in range(0, samples, BATCH_SIZE)]

    def run() -> float:
        start = time.perf_counter()
        for batch in batches:
            reader.read(batch)
        return time.perf_counter() - start

    return run


def _size(store: KVStore) -> int:
    return stored_bytes(store.length, store.geometry, store.codec.name)


def _errors(store: KVStore, raw: KVStore) -> list[float]:
    """Of keys and of values, over the first samples."""
    found, expected = (KVReader(s).read(range(256)).float() for s in (store, raw))
    return [float(torch.norm((found - expected)[:, kind]) / torch.norm(expected[:, kind])) for kind in range(2)]


if __name__ == "__main__":
    print(HEADER, *measure(), sep="\n")  # noqa: T201
