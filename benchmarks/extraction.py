"""Extraction wall over the bare teacher forward, over the very same batches. Aim: <= 1.05.

The second figure is what can be had on a CPU: the same extraction over a forward that is followed by plain writes, in
one piece a shard and flushed, of as many bytes. There the teacher computes on every core, so whatever else
has to be done takes its time on top.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.models import in_fast_arithmetic, load_teacher, resolve_device, resolve_dtype
from kvpipe.pipeline.teacher_pass import plan_batches, plan_windows
from side_by_side import HEADER, Ratio, alternate, quiet, ratio

RUNS = 5


def measure(
    model: str = "qwen",
    device: str = "auto",
    dtype: str = "auto",
    samples: int | None = None,
    runs: int = RUNS,
    **kept: Any,
) -> list[Ratio]:
    """Both ratios for one teacher on one device; `samples` as for `kvpipe extract`, and what is `kept`: `codec`,
    `evict`, `budget`."""
    with tempfile.TemporaryDirectory() as folder:
        config = ExtractConfig(model, Path(folder) / "bench.zarr", samples=samples, device=device, dtype=dtype, **kept)
        timed = {"extract": extraction(config), "forward": bare_forward(config), "writes": plain_writes(config)}
        rounds = alternate(timed, runs)
    for seconds in rounds:
        seconds["limit"] = seconds["forward"] + seconds["writes"]
    name = f"({', '.join([Path(model).name, dtype, *map(str, kept.values())])})"
    return [
        ratio(f"extraction / bare forward {name}", rounds, "extract", "forward", aim=1.05),
        ratio(f"extraction / bare forward, then plain writes {name}", rounds, "extract", "limit", aim=1.05),
    ]


def measure_all() -> list[Ratio]:
    """The built-in teacher in its own dtype and in float32."""
    return measure() + measure(dtype="float32")


def extraction(config: ExtractConfig) -> Callable[[], float]:
    def run() -> float:
        shutil.rmtree(config.store, ignore_errors=True)
        return extract(config, quiet()).seconds

    return run


def bare_forward(config: ExtractConfig) -> Callable[[], float]:
    device = resolve_device(config.device)
    teacher = in_fast_arithmetic(load_teacher(config.model, dtype=resolve_dtype(config.dtype), device=device))

    @torch.inference_mode()
    def run() -> float:
        store = KVStore.open(config.store)
        windows = plan_windows(store, config.batch_size, device)
        everything = plan_batches(store, windows, config.batch_size, device, set(range(store.num_shards)))
        start = time.perf_counter()
        for batch in everything:
            length = torch.from_numpy(store.length[batch])
            width = int(length.max())
            ids = torch.from_numpy(store.input_ids[batch, :width].astype(np.int64)).to(device)
            mask = (torch.arange(width)[None] < length[:, None]).long().to(device)
            teacher.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return run


def plain_writes(config: ExtractConfig) -> Callable[[], float]:
    """As many files of the same sizes, from memory that is already there."""

    def run() -> float:
        store = KVStore.open(config.store)
        shards = [store.shard_paths(shard) for shard in range(store.num_shards)]
        sizes = [path.stat().st_size for paths in shards for path in paths]
        data = np.ones(max(sizes), np.uint8)
        with tempfile.TemporaryDirectory(dir=config.store.parent) as folder:
            start = time.perf_counter()
            for number, size in enumerate(sizes):
                with (Path(folder) / str(number)).open("wb", buffering=0) as file:
                    file.write(data[:size].data)
                    os.fsync(file.fileno())
            return time.perf_counter() - start

    return run


if __name__ == "__main__":
    print(HEADER, *(found.row for found in measure_all()), sep="\n")  # noqa: T201
