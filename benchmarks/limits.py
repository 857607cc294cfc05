"""What binds reading and extraction: the same work with one part of it taken away, over the limit of each.

`python benchmarks/limits.py`. Reading: random batches, over np.memmap. Extraction: over the bare teacher forward. The
difference to the whole is what a part costs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from extraction import bare_forward, extraction, plain_writes
from kvpipe.kvcache.chunk_reader import ChunkReader
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.extract_config import ExtractConfig
from peers import BATCH_SIZE, readers
from reading import SHAPES, Shape, random_samples, seconds, write_store
from side_by_side import alternate, of_values

RUNS = 5
HEADER = "| what | median | range | runs |\n|---|---|---|---|"

UNCHECKED: dict[str, Any] = {"kvpipe.kvcache.chunk_reader.require_checksums": lambda *_: None}
UNSUMMED: dict[str, Any] = {"kvpipe.kvcache.shard.crc32c": lambda data, before=0: 0}
UNWRITTEN: dict[str, Any] = {"kvpipe.kvcache.files.PartialFile.write_at": lambda *_: None}
UNSEEN: dict[str, Any] = {
    "kvpipe.kvcache.staging.finite_samples": lambda _, lengths: torch.ones(len(lengths), dtype=torch.bool)
}


def measure_reading(shape: Shape) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        samples = list(random_samples(shape))
        store = write_store(shape, samples, Path(folder) / "x.zarr")
        order = np.random.default_rng(0).permutation(shape.samples)
        batches = [order[first : first + BATCH_SIZE].tolist() for first in range(0, shape.samples, BATCH_SIZE)]
        read = readers(store, samples, Path(folder))

        def epoch(one: Callable[[Sequence[int]], Any]) -> Callable[[], float]:
            return lambda: seconds(map(one, batches))

        timed = {
            "np.memmap": epoch(read["np.memmap"]),
            "kvpipe": epoch(read["kvpipe"]),
            "kvpipe, checksums not compared": _without(epoch(read["kvpipe"]), UNCHECKED),
            "the same files into memory, nothing else": _without(epoch(_into_memory(store)), UNCHECKED),
        }
        return _rows(f"reading, {shape.name}", timed, "np.memmap")


def measure_extraction() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        config = ExtractConfig("qwen", Path(folder) / "x.zarr")
        run = extraction(config)
        timed = {
            "extraction": run,
            "bare forward": bare_forward(config),
            "plain writes of as many bytes, flushed": plain_writes(config),
            "extraction, no checksums": _without(run, UNSUMMED),
            "extraction, not looked at for NaN": _without(run, UNSEEN),
            "extraction, nothing written": _without(run, UNWRITTEN),
            "extraction, none of the three": _without(run, UNSUMMED | UNWRITTEN | UNSEEN),
        }
        return _rows("qwen", timed, "bare forward")


def _into_memory(store: KVStore) -> Callable[[Sequence[int]], None]:
    """Every sample's chunks as one range, into memory that is there already: the copy out of the page cache."""
    reader = ChunkReader(store, ["kv"])
    blocks = [store.layout.blocks_of(int(length)) for length in store.length]

    def read(indices: Sequence[int]) -> None:
        for _ in reader.read(indices, [blocks[index] for index in indices]):
            pass

    return read


def _without(run: Callable[[], float], parts: Mapping[str, Callable[..., Any]]) -> Callable[[], float]:
    def timed() -> float:
        with ExitStack() as patches:
            for name, instead in parts.items():
                patches.enter_context(patch(name, instead))
            return run()

    return timed


def _rows(title: str, timed: Mapping[str, Callable[[], float]], limit: str) -> list[str]:
    rounds = alternate(timed, RUNS)
    found = [of_values(f"{name} / {limit} ({title})", [r[name] / r[limit] for r in rounds], aim=1) for name in timed]
    return [f"| {f.name} | {f.median:.2f} | {f.low:.2f}-{f.high:.2f} | {f.runs} |" for f in found if f.median != 1]


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} cores\n\n{HEADER}")  # noqa: T201
    for shape in SHAPES:
        print(*measure_reading(shape), sep="\n", flush=True)  # noqa: T201
    print(*measure_extraction(), sep="\n")  # noqa: T201
