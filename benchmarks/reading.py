"""Reading the store over reading the same bytes from np.memmap, and beside what others do. Aim: <= 1 / 0.9.

Two regimes: `random`, batches of samples drawn from the whole store, and `stream`, one epoch in an order that is
shuffled shard by shard. Everybody gives the same thing, one padded batch `[L, 2, B, H, T, D]` at a time, from files in
the page cache. The limit, np.memmap, knows every sample's place beforehand and checks nothing; kvpipe compares each
chunk with the ledger's checksum, and nobody else in this table would notice a flipped bit.

    pip install litdata mosaicml-streaming   # peers that are measured where they are installed
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvpipe.data.batching import ShuffledBatches
from kvpipe.kvcache.create import SampleTable, create_store, json_lines
from kvpipe.kvcache.layout import KVGeometry
from kvpipe.kvcache.manifest import DatasetIdentity, Manifest, TeacherIdentity
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.writer import ShardWriter
from kvpipe.pipeline.training_data import KVDataset
from peers import BATCH_SIZE, SHARD_BYTES, Read, loaders, readers
from side_by_side import HEADER, Ratio, alternate, of_values, ratio
from torch import Tensor

RUNS = 7
AIM = 1 / 0.9


@dataclass(frozen=True)
class Shape:
    """A teacher's KV, and samples of 1 to `longest` tokens."""

    name: str
    geometry: KVGeometry
    longest: int
    samples: int


SHAPES = [
    Shape("tiny", KVGeometry(4, 4, 32, torch.bfloat16), 96, 4096),
    Shape("0.5B", KVGeometry(24, 2, 64, torch.bfloat16), 512, 160),
    Shape("7B", KVGeometry(28, 4, 128, torch.bfloat16), 512, 64),
]


MANY = Shape("100,000 samples", KVGeometry(1, 1, 4, torch.bfloat16), 64, 100_000)
"""Their number is what counts here: in 5000 shards, as 20 of a 0.5B teacher's samples would fill one."""


def measure(runs: int = RUNS) -> list[Ratio]:
    return [found for shape in SHAPES for found in measure_shape(shape, runs)] + [measure_first_batch(runs)]


def measure_first_batch(runs: int = RUNS) -> Ratio:
    """Seconds from opening a large store to the first batch of an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(MANY, list(random_samples(MANY)), Path(folder) / "x.zarr", samples_per_shard=20).path
        rounds = alternate({"first": lambda: _first_batch(path)}, runs)
    return of_values(f"seconds to the first batch, {MANY.name}", [seconds["first"] for seconds in rounds], aim=1)


def _first_batch(path: Path) -> float:
    start = time.perf_counter()
    store = KVStore.open(path)
    data = KVDataset(store, with_kv=True)
    order = ShuffledBatches(store.indices("train"), store.length, BATCH_SIZE, 0, store.layout.samples)
    data.__getitems__(next(iter(order)))
    return time.perf_counter() - start


def measure_shape(shape: Shape, runs: int = RUNS) -> list[Ratio]:
    """Both regimes for one shape: kvpipe, and every peer, over the limit."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        samples = list(random_samples(shape))
        store = write_store(shape, samples, place / "x.zarr")
        rng = np.random.default_rng(0)
        random = [rng.choice(shape.samples, BATCH_SIZE, replace=False).tolist() for _ in range(shape.samples // 16)]
        order = ShuffledBatches(np.arange(shape.samples), store.length, BATCH_SIZE, 0, store.layout.samples)
        read_by = readers(store, samples, place)
        timed: dict[str, Callable[[], float]] = {}
        for name, read in read_by.items():
            timed[f"random {name}"] = lambda read=read: seconds(map(read, random))  # type: ignore[misc]
            timed[f"stream {name}"] = lambda read=read: seconds(map(read, order))  # type: ignore[misc]
        for name, loader in loaders(samples, place):
            timed[f"stream {name}"] = lambda loader=loader: seconds(loader())  # type: ignore[misc]
        _require_same(read_by, random[0])
        rounds = alternate(timed, runs)
    return [
        ratio(f"{name} / np.memmap ({shape.name})", rounds, name, f"{name.split()[0]} np.memmap", aim=AIM)
        for name in timed
        if not name.endswith("np.memmap")
    ]


def random_samples(shape: Shape) -> Iterator[Tensor]:
    """KV `[L, 2, H, T, D]` of one sample after the other."""
    g, rng = shape.geometry, np.random.default_rng(1)
    for length in rng.integers(1, shape.longest + 1, shape.samples).tolist():
        yield torch.from_numpy(
            rng.standard_normal((g.num_layers, 2, g.num_kv_heads, length, g.head_dim), np.float32)
        ).to(g.dtype)


def write_store(shape: Shape, samples: list[Tensor], path: Path, samples_per_shard: int | None = None) -> KVStore:
    g, count = shape.geometry, len(samples)
    length = np.array([sample.shape[3] for sample in samples], np.int32)
    table = SampleTable(
        text=json_lines({"id": str(i), "prompt": "", "reasoning": "", "answer": ""} for i in range(count)),
        split_names=("train",),
        split=np.zeros(count, np.int8),
        length=length,
        input_ids=np.zeros(length.sum(), np.int32),
        segment_ids=np.zeros(length.sum(), np.int8),
        spans=np.zeros((length.sum(), 2), np.int32),
    )
    manifest = Manifest(
        schema_version=1,
        teacher=TeacherIdentity("random", "", g.num_layers, "", ""),
        tokenizer_hash="",
        dataset=DatasetIdentity("random", count, ""),
        reasoning="dataset",
        dtype="bfloat16",
        codec="raw",
        layers=tuple(range(g.num_layers)),
        segments=("prompt", "reasoning", "answer"),
        eviction="none",
        budget=None,
        queries=False,
        key_position="none",
        rope={},
        max_tokens=shape.longest,
        seed=0,
    )
    per_shard = samples_per_shard or max(1, int(SHARD_BYTES / (g.bytes_per_token * table.length.mean())))
    store = create_store(path, manifest, table, g, tokenizer_files={}, truncated=0, samples_per_shard=per_shard)
    with ShardWriter(store, range(store.num_shards)) as writer:
        for index, sample in enumerate(samples):
            writer.put([index], [(key[None], value[None]) for key, value in sample])
    return store


def _require_same(readers: dict[str, Read], batch: list[int]) -> None:
    expected = readers["np.memmap"](batch)
    for name, read in readers.items():
        assert torch.equal(read(batch), expected), name


def seconds(batches: Iterable[Any]) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    print(HEADER, *(found.row for found in measure(parser.parse_args().runs)), sep="\n")  # noqa: T201
