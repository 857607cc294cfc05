"""What an extraction will cost, before it is paid: sizes counted, speeds measured on a few samples, here and now."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace

import torch
from rich.progress import Progress

from ..kvcache.create import SampleTable
from ..kvcache.reader import KVReader
from ..kvcache.store import KVStore
from .bench import read_all
from .extract import is_store, new_store, open_store, require_place, samples_per_shard
from .extract_config import ExtractConfig
from .generation import chunks
from .preparation import Prepared, prepare, sample_table
from .progress import progress_bar
from .scratch import scratch_folder
from .teacher_pass import capture_samples, plan_batches, plan_windows, run_teacher
from .timing import in_turn

MEASURED_TOKENS = 8192
"""Enough for a few batches of each kind."""

READ_BATCH = 16


@dataclass(frozen=True)
class Rates:
    """Tokens a second of the teacher alone, of the extraction and of reading the store."""

    forward: float
    extract: float
    read: float

    @property
    def break_even(self) -> int | None:
        """The least number of runs, one teacher pass each, for which extracting once and reading in every run costs
        less than asking the teacher in every run; None where reading is no faster than the teacher."""
        saved = 1 / self.forward - 1 / self.read
        return math.floor(1 / self.extract / saved) + 1 if saved > 0 else None


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes: `store_bytes`, of which `query_bytes` are queries' and `missing_bytes` still to be written, and
    `raw_bytes` of a store of raw KV of all layers and tokens. No rates where the few samples to measure them on do not
    fit on the disk, or have no KV to keep."""

    samples: int
    tokens: int
    truncated: int
    store_bytes: int
    query_bytes: int
    missing_bytes: int
    raw_bytes: int
    free_bytes: int
    rates: Rates | None

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= self.free_bytes


def make_plan(config: ExtractConfig, progress: Progress | None = None) -> Plan:
    """Count and measure. Nothing is left on the disk. Raises what `extract` raises."""
    folder = require_place(config.store)
    prepared = prepare(config, progress)
    there = open_store(config, prepared) if is_store(config.store) else None
    table, free_bytes = sample_table(prepared), shutil.disk_usage(folder).free
    sampled, rates = prepared.first(MEASURED_TOKENS), None
    part = sample_table(sampled)
    if part.stored_bytes(prepared.geometry, config.codec, samples_per_shard(config, prepared, part)) <= free_bytes:
        with progress or progress_bar() as bar, scratch_folder(folder) as scratch:
            rates = _rates(replace(config, store=scratch / "part.zarr"), sampled, part, bar)
    samples, without = samples_per_shard(config, prepared, table), replace(prepared.geometry, num_query_heads=0)
    store_bytes = table.stored_bytes(prepared.geometry, config.codec, samples)
    return Plan(
        samples=len(table.length),
        tokens=int(table.length.sum()),
        truncated=prepared.truncated,
        store_bytes=store_bytes,
        query_bytes=store_bytes - table.stored_bytes(without, config.codec, samples),
        missing_bytes=there.missing_bytes if there else store_bytes,
        raw_bytes=replace(table, kv_length=None).stored_bytes(prepared.every_layer, "raw", samples),
        free_bytes=free_bytes,
        rates=rates,
    )


def _rates(config: ExtractConfig, prepared: Prepared, table: SampleTable, bar: Progress) -> Rates | None:
    """Of the bare forward, of one extraction and of reading, on the same samples; None where none of them has KV."""
    store = new_store(config, prepared, table)
    tokens = int(store.length.sum())
    (forward,) = in_turn([lambda: _forward(store, prepared, config.batch_size)])
    report = run_teacher(store, prepared.teacher, config.batch_size, bar)
    reader = KVReader(store)
    kept = int(store.length[store.with_kv].sum())
    if not kept:
        return None
    batches = chunks(store.with_kv.tolist(), READ_BATCH)
    (read,) = in_turn([lambda: read_all(reader, batches)])
    return Rates(tokens / forward.seconds, report.teacher_tokens / report.seconds, kept / read.seconds)


@torch.inference_mode()
def _forward(store: KVStore, prepared: Prepared, batch_size: int | None) -> None:
    device = prepared.teacher.device
    windows, everything = plan_windows(store, batch_size, device), set(range(store.num_shards))
    for batch in plan_batches(store, windows, batch_size, device, everything):
        capture_samples(store, prepared.teacher, batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
