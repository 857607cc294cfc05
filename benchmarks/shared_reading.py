"""Runs side by side on one machine read the disk once: what a second reader of the same store adds.

Two processes read the same store at once, in other orders, after its pages were dropped. Bytes fetched from the disk by
both together, over the store's size: 1 where the page cache is shared, 2 where each reads for itself.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path

import numpy as np
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from side_by_side import HEADER, Ratio, of_values, quiet

SAMPLES, BATCH, ROUNDS = 600, 8, 3


def read_all(store: Path, seed: int) -> int:
    """Read every sample once, in a random order; return the bytes that came from the disk for this process."""
    before = _fetched()
    opened = KVStore.open(store)
    reader = KVReader(opened)
    order = np.random.default_rng(seed).permutation(opened.num_samples)
    for start in range(0, len(order), BATCH):
        reader.read(order[start : start + BATCH].tolist())
    return _fetched() - before


def _fetched() -> int:
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["read_bytes"])


def _forget(store: Path) -> None:
    """Drop the store's pages from memory."""
    for file in filter(Path.is_file, store.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(rounds: int = ROUNDS) -> list[Ratio]:
    """Bytes from the disk over the store's size, for one reader and for two at once."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        store = Path(folder) / "bench.zarr"
        extract(ExtractConfig("qwen", store, samples=SAMPLES, eval_samples=8, dtype="float32"), quiet())
        size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
        found: dict[int, list[float]] = {1: [], 2: []}
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            pool.starmap(read_all, [(store, 0), (store, 1)])  # imports done
            for _ in range(rounds):
                for readers, ratios in found.items():
                    _forget(store)
                    fetched = pool.starmap(read_all, [(store, seed) for seed in range(readers)], chunksize=1)
                    ratios.append(sum(fetched) / size)
    return [
        of_values(f"bytes from disk / store, {readers} reader{'s' if readers > 1 else ''}", ratios, aim=1.0)
        for readers, ratios in found.items()
    ]


if __name__ == "__main__":
    print(HEADER, *(found.row for found in measure()), sep="\n")  # noqa: T201
