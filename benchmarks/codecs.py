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
from typing import Any

import numpy as np
import torch
from kvpipe.kvcache.codec import CODECS, Scaled
from kvpipe.kvcache.create import TOKEN_BLOCK, kv_bytes
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from numcodecs import Blosc, Zstd
from side_by_side import alternate, of_values, quiet
from torch import Tensor

RUNS = 3
BATCH_SIZE = 16
LOSSLESS = {
    "zstd, level 1": Zstd(level=1),
    "blosc lz4, bits shuffled": Blosc("lz4", clevel=5, shuffle=Blosc.BITSHUFFLE),
    "blosc zstd, bytes shuffled": Blosc("zstd", clevel=3, shuffle=Blosc.SHUFFLE),
}
THETA = 10_000.0
"""Of the built-in teacher's rotation."""

LOSSLESS_HEADER = "| lossless | bytes | decoding / copying |\n|---|---|---|"
ROPE_HEADER = "| codec | error of keys as stored | before rotation |\n|---|---|---|"
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


def measure_alternatives(samples: int = 256) -> list[str]:
    """What was tried and not taken: lossless compression of raw chunks, and keys quantised before their rotation."""
    with tempfile.TemporaryDirectory() as folder:
        config = ExtractConfig("qwen", Path(folder) / "raw.zarr", samples=samples, eval_samples=8)
        store = extract(config, quiet()).store
        chunks = _raw_chunks(store)
        rows = [_lossless(name, codec, chunks) for name, codec in LOSSLESS.items()]
        return [LOSSLESS_HEADER, *rows, "", ROPE_HEADER, *(_rope(store, name) for name in CODECS if name != "raw")]


def _raw_chunks(store: KVStore) -> list[bytes]:
    layout, found = store.layout, []
    for shard in range(store.num_shards):
        data = store.shard_path(shard).read_bytes()[: -layout.index_bytes]
        records = [data[i : i + layout.chunk_bytes] for i in range(0, len(data), layout.record_bytes)]
        found += records
    return found


def _lossless(name: str, codec: Any, chunks: list[bytes]) -> str:
    packed = [codec.encode(np.frombuffer(chunk, np.uint16)) for chunk in chunks]
    start = time.perf_counter()
    for chunk in packed:
        codec.decode(chunk)
    seconds, size = time.perf_counter() - start, sum(map(len, chunks))
    start = time.perf_counter()
    for raw in chunks:
        bytearray(raw)
    copying = time.perf_counter() - start
    return f"| {name} | {sum(map(len, packed)) / size:.3f} | {seconds / copying:.1f} |"


def _rope(store: KVStore, name: str) -> str:
    """Errors of keys quantised as they are stored, and before their rotation."""
    codec, errors = CODECS[name], []
    assert isinstance(codec, Scaled)
    samples = [index for index in range(store.num_samples) if store.length[index] >= TOKEN_BLOCK]
    keys = KVReader(store).read(samples, TOKEN_BLOCK)[:, 0].float()
    for back, forth in ((0, 0), (-1, 1)):
        turned = rotated(keys, back).transpose(0, 1)[:, :, None].expand(-1, -1, 2, -1, -1, -1)
        decoded = codec.decode(codec.encode(turned.to(store.dtype)), store.dtype)
        found = rotated(decoded[:, :, 0].transpose(0, 1).float(), forth)
        errors.append(float(torch.norm(found - keys) / torch.norm(keys)))
    return f"| {name} | {errors[0]:.4f} | {errors[1]:.4f} |"


def rotated(keys: Tensor, turns: int) -> Tensor:
    """Keys `[L, B, H, T, D]` turned by their places, or with -1 turned back: halves are pairs, as in Llama and Qwen."""
    half = keys.shape[-1] // 2
    angles = torch.arange(keys.shape[-2])[:, None] * THETA ** (-torch.arange(half) / half)
    cos, sin = (turns * angles).cos(), (turns * angles).sin()
    first, second = keys[..., :half], keys[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


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
    return kv_bytes(store.length, store.geometry, store.codec.name)


def _errors(store: KVStore, raw: KVStore) -> list[float]:
    """Of keys and of values, over the first samples."""
    found, expected = (KVReader(s).read(range(256)).float() for s in (store, raw))
    return [float(torch.norm((found - expected)[:, kind]) / torch.norm(expected[:, kind])) for kind in range(2)]


if __name__ == "__main__":
    print(HEADER, *measure(), "", *measure_alternatives(), sep="\n")  # noqa: T201
