"""kvpipe's own reading and writing of shards beside the engines that know Zarr: the same files, over kvpipe's seconds.

`python benchmarks/engines.py`. Reading: batches of 16 samples in an order that is shuffled shard by shard, every
sample asked for as a range of its own. Writing: kvpipe from batches of 16 samples, as a teacher leaves them, all others
a shard in one call, laid out beforehand and padded to whole chunks, of which empty ones are left out. kvpipe flushes
what it writes, as tensorstore does; zarr-python and zarrs do not.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import torch
import zarr
from kvpipe.data.batching import ShuffledBatches
from kvpipe.kvcache.layout import Pairs
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.writer import ShardWriter
from kvpipe.pipeline.bench_writing import write_plainly
from peers import BATCH_SIZE, Read, padded, readers
from reading import SHAPES, Shape, random_samples, seconds, write_store
from side_by_side import alternate, of_values
from torch import Tensor

RUNS = 3
ENGINES = {"zarr-python": "zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs": "zarrs.ZarrsCodecPipeline"}
HEADER = "| engine / kvpipe | median | range | runs |\n|---|---|---|---|"


def measure(shape: Shape) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        samples = list(random_samples(shape))
        store = write_store(shape, samples, Path(folder) / "x.zarr")
        order = ShuffledBatches(np.arange(shape.samples), store.length, BATCH_SIZE, 0, store.layout.samples)
        own = readers(store, samples, Path(folder))
        read = {name: own[name] for name in ("kvpipe", "tensorstore")}
        read |= {name: _zarr_reader(store, pipeline) for name, pipeline in ENGINES.items()}
        reading = {name: lambda one=one: seconds(map(one, order)) for name, one in read.items()}
        arrays = [_shard(store, samples, shard) for shard in range(store.num_shards)]
        batches = list(_batches(store, samples))
        contents = [path.read_bytes() for shard in range(store.num_shards) for path in store.shard_paths(shard)]
        writing: dict[str, Callable[[], float]] = {"kvpipe": lambda: _write(store, batches)}
        writing["plain files"] = lambda: _write_plainly(contents, Path(folder))
        writing["tensorstore"] = lambda: _write_tensorstore(store, arrays)
        writing |= {name: lambda p=pipeline: _write_zarr(store, arrays, p) for name, pipeline in ENGINES.items()}
        return _rows(f"reading, {shape.name}", reading) + _rows(f"writing, {shape.name}", writing)  # type: ignore[arg-type]


def _zarr_reader(store: KVStore, pipeline: str) -> Read:
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        array = zarr.open_array(store.path / "kv", mode="r")
    lengths = store.length.tolist()

    def read(indices: Sequence[int]) -> Tensor:
        return padded([np.asarray(array[:, :, i, :, : lengths[i]]) for i in indices])

    return read


def _shard(store: KVStore, samples: list[Tensor], shard: int) -> np.ndarray[Any, Any]:
    """A shard's part of the array, zero past every sample's end."""
    members = store.shard_samples(shard)
    layers, kinds, _, heads, width, channels = store.shape
    out = np.zeros((layers, kinds, len(members), heads, width, channels), np.uint16)
    for row, index in enumerate(members):
        out[:, :, row, :, : samples[index].shape[3]] = samples[index].view(torch.uint16).numpy()
    return out


def _batches(store: KVStore, samples: list[Tensor]) -> Iterator[tuple[list[int], Pairs]]:
    """As a teacher leaves them: padded, key and value of every layer."""
    for shard in range(store.num_shards):
        members = store.shard_samples(shard)
        for first in range(members.start, members.stop, BATCH_SIZE):
            batch = list(range(first, min(first + BATCH_SIZE, members.stop)))
            kv = padded([samples[index].view(torch.uint16).numpy() for index in batch])
            yield batch, [(key, value) for key, value in kv]


def _write(store: KVStore, batches: list[tuple[list[int], Pairs]]) -> float:
    """The shards once more, in their places."""
    start = time.perf_counter()
    with ShardWriter(store, range(store.num_shards)) as writer:
        for indices, pairs in batches:
            writer.put(indices, pairs)
    return time.perf_counter() - start


def _write_plainly(contents: list[bytes], folder: Path) -> float:
    """The same bytes as they lie: the limit of the disk."""
    start = time.perf_counter()
    write_plainly(contents, folder)
    return time.perf_counter() - start


def _write_zarr(store: KVStore, arrays: list[np.ndarray[Any, Any]], pipeline: str) -> float:
    with _empty_array(store) as path, zarr.config.set({"codec_pipeline.path": pipeline}):
        array = zarr.open_array(path, mode="r+")
        start = time.perf_counter()
        for shard, data in enumerate(arrays):
            first = store.shard_samples(shard)[0]
            array[:, :, first : first + data.shape[2]] = data
        return time.perf_counter() - start


def _write_tensorstore(store: KVStore, arrays: list[np.ndarray[Any, Any]]) -> float:
    with _empty_array(store) as path:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        array = tensorstore.open(spec, write=True, read=True).result()
        start = time.perf_counter()
        for shard, data in enumerate(arrays):
            first = store.shard_samples(shard)[0]
            array[:, :, first : first + data.shape[2]].write(data).result()
        return time.perf_counter() - start


@contextmanager
def _empty_array(store: KVStore) -> Iterator[Path]:
    """An array like the store's `kv`, with nothing in it."""
    with tempfile.TemporaryDirectory(dir=store.path.parent) as folder:
        shutil.copy(store.path / "kv" / "zarr.json", folder)
        yield Path(folder)


def _rows(title: str, timed: dict[str, Callable[[], float]]) -> list[str]:
    rounds = alternate(timed, RUNS)
    found = [of_values(f"{name} ({title})", [r[name] / r["kvpipe"] for r in rounds], aim=1) for name in timed]
    return [f"| {f.name} | {f.median:.2f} | {f.low:.2f}-{f.high:.2f} | {f.runs} |" for f in found[1:]]


if __name__ == "__main__":
    print(HEADER)  # noqa: T201
    for shape in SHAPES:
        print(*measure(shape), sep="\n", flush=True)  # noqa: T201
