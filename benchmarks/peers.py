"""The readers that benchmarks/reading.py compares: each gives the KV of a batch of samples, from files of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import torch
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BATCH_SIZE, SHARD_BYTES = 16, 64_000_000

Read = Callable[[Sequence[int]], Tensor]


def readers(store: KVStore, samples: list[Tensor], place: Path) -> dict[str, Read]:
    return {
        "np.memmap": _memmap(samples, place / "flat.bin"),
        "kvpipe": KVReader(store).read,
        "safetensors, a file a shard": _safetensors(store, samples, place / "safetensors"),
        "torch.load, a file a sample": _torch_load(samples, place / "torch"),
        "tensorstore": _tensorstore(store),
    }


def _memmap(samples: list[Tensor], path: Path) -> Read:
    """One sample after the other in one file."""
    starts = np.cumsum([0] + [sample.numel() for sample in samples])
    with path.open("wb") as file:
        for sample in samples:
            file.write(sample.contiguous().view(torch.uint16).numpy().tobytes())
    flat, shapes = np.memmap(path, np.uint16, "r"), [tuple(sample.shape) for sample in samples]

    def read(indices: Sequence[int]) -> Tensor:
        return padded([flat[starts[i] : starts[i + 1]].reshape(shapes[i]) for i in indices])

    return read


def _safetensors(store: KVStore, samples: list[Tensor], folder: Path) -> Read:
    folder.mkdir()
    files = []
    for shard in range(store.num_shards):
        files.append(folder / f"{shard}.safetensors")
        save_file({str(i): samples[i].contiguous() for i in store.shard_samples(shard)}, files[-1])
    opened = [safe_open(file, "pt") for file in files]

    def read(indices: Sequence[int]) -> Tensor:
        found = [opened[i // store.layout.samples].get_tensor(str(i)) for i in indices]
        return padded([tensor.view(torch.uint16).numpy() for tensor in found])

    return read


def _torch_load(samples: list[Tensor], folder: Path) -> Read:
    folder.mkdir()
    for index, sample in enumerate(samples):
        torch.save(sample.clone(), folder / f"{index}.pt")

    def read(indices: Sequence[int]) -> Tensor:
        found = [torch.load(folder / f"{i}.pt", weights_only=True) for i in indices]
        return padded([tensor.view(torch.uint16).numpy() for tensor in found])

    return read


def _tensorstore(store: KVStore) -> Read:
    """Its own zarr3 driver, on kvpipe's files, all samples of a batch asked for at once."""
    array = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.path / "kv")}}, read=True
    ).result()
    lengths = store.length.tolist()

    def read(indices: Sequence[int]) -> Tensor:
        asked = [array[:, :, i, :, : lengths[i]].read() for i in indices]
        return padded([found.result() for found in asked])

    return read


def padded(samples: list[np.ndarray[Any, Any]]) -> Tensor:
    layers, kinds, heads, _, channels = samples[0].shape
    out = np.empty((layers, kinds, len(samples), heads, max(s.shape[3] for s in samples), channels), np.uint16)
    for row, sample in enumerate(samples):
        out[:, :, row, :, : sample.shape[3]] = sample
        out[:, :, row, :, sample.shape[3] :] = 0
    return torch.from_numpy(out).view(torch.bfloat16)


def loaders(samples: list[Tensor], place: Path) -> Iterator[tuple[str, Callable[[], Iterable[Any]]]]:
    """Whole loaders with a shuffle of their own, in this process as kvpipe's reader is."""
    if importlib.util.find_spec("streaming"):
        yield "MDS", _mds(samples, place / "mds")
    if importlib.util.find_spec("litdata"):
        yield "litdata", _litdata(samples, place / "litdata")


def _mds(samples: list[Tensor], folder: Path) -> Callable[[], Iterable[Tensor]]:
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]

    with MDSWriter(out=str(folder), columns={"kv": "bytes", "tokens": "int"}, size_limit=SHARD_BYTES) as writer:
        for sample in samples:
            writer.write(
                {"kv": sample.contiguous().view(torch.uint16).numpy().tobytes(), "tokens": int(sample.shape[3])}
            )
    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH_SIZE, num_canonical_nodes=1)
    layers, kinds, heads, _, channels = samples[0].shape

    def epoch() -> Iterator[Tensor]:
        batch = []
        for item in data:
            array = np.frombuffer(item["kv"], np.uint16).reshape(layers, kinds, heads, item["tokens"], channels)
            batch.append(array)
            if len(batch) == BATCH_SIZE:
                yield padded(batch)
                batch = []

    return epoch


def _litdata(samples: list[Tensor], folder: Path) -> Callable[[], Iterable[Tensor]]:
    from litdata import StreamingDataset  # type: ignore[import-not-found]
    from litdata.streaming.writer import BinaryWriter  # type: ignore[import-not-found]

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=SHARD_BYTES)
    for index, sample in enumerate(samples):
        writer[index] = sample.contiguous().view(torch.uint16).numpy()
    writer.done()
    writer.merge(1)
    data = StreamingDataset(str(folder), shuffle=True)

    def epoch() -> Iterator[Tensor]:
        batch = []
        for item in data:
            batch.append(item)
            if len(batch) == BATCH_SIZE:
                yield padded(batch)
                batch = []

    return epoch
