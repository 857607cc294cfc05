"""The teacher reads what a store lacks, and its KV goes there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from ..data.batching import length_batches
from ..kvcache.capture import CaptureCache
from ..kvcache.layout import layer_pairs
from ..kvcache.staging import Pairs
from ..kvcache.store import KVStore
from ..kvcache.writer import OnNonfinite, ShardWriter

AUTO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Padded tokens in a batch under `--batch-size auto`."""

WINDOW_BATCHES = 8
"""Samples are grouped by length within windows of whole shards that hold about this many batches."""

MAX_OPEN_SHARDS = 64
"""Shards of a window are written side by side, each through a file handle of its own."""


@dataclass(frozen=True)
class ExtractReport:
    """What one call of `extract` did. `seconds` and `teacher_tokens` are zero where nothing was left to do."""

    store: KVStore
    seconds: float
    teacher_tokens: int
    bytes_written: int
    wait_seconds: float


def capture_kv(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Pairs:
    """Key and value `[B, H, T, D]` of every layer, from one forward of the base model (no LM head)."""
    cache = CaptureCache(model.config)
    model.base_model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
    cache.check_complete()
    return layer_pairs(cache)


def plan_batches(
    store: KVStore, batch_size: int | None, device: torch.device, missing: set[int]
) -> Iterator[list[int]]:
    """The batches that fill the `missing` shards.

    A batch's samples depend on the store's lengths and the batch size alone, never on what is already
    written: a resumed extraction repeats the very same forwards, so it ends with the very same bytes.
    """
    max_tokens = AUTO_BATCH_TOKENS[device.type]
    mean_batch = batch_size or max(1, max_tokens // int(store.length.mean()))
    one_batch, window = (-(-count * mean_batch // store.layout.samples) for count in (1, WINDOW_BATCHES))
    window = max(min(window, MAX_OPEN_SHARDS), one_batch)
    for first in range(0, store.num_shards, window):
        last = min(first + window, store.num_shards) - 1
        samples = range(store.shard_samples(first).start, store.shard_samples(last).stop)
        for batch in length_batches(samples, store.length, batch_size, max_tokens):
            if any(index // store.layout.samples in missing for index in batch):
                yield batch


@torch.inference_mode()
def run_teacher(
    store: KVStore,
    teacher: PreTrainedModel,
    batch_size: int | None,
    progress: Progress,
    *,
    on_nonfinite: OnNonfinite = "exclude",
) -> ExtractReport:
    """Write every shard that is not in the ledger; `batch_size` None goes by a budget of padded tokens."""
    missing = set(range(store.num_shards)) - store.finished_shards()
    if not missing:
        return ExtractReport(store, seconds=0.0, teacher_tokens=0, bytes_written=0, wait_seconds=0.0)
    batches = list(plan_batches(store, batch_size, teacher.device, missing))
    total = int(sum(store.length[i] for batch in batches for i in batch))
    task = progress.add_task("extract", total=total, status="")
    start, tokens = time.perf_counter(), 0
    try:
        with ShardWriter(store, missing, on_nonfinite=on_nonfinite) as writer:
            for batch in batches:
                length = torch.from_numpy(store.length[batch])
                width = int(length.max())
                ids = torch.from_numpy(store.input_ids[batch, :width].astype(np.int64)).to(teacher.device)
                mask = (torch.arange(width)[None] < length[:, None]).long().to(teacher.device)
                writer.put(batch, capture_kv(teacher, ids, mask))
                tokens += int(length.sum())
                progress.update(task, completed=tokens, status=_status(writer, tokens, time.perf_counter() - start))
    finally:
        # An interrupted run has cost the teacher's time as well.
        seconds = time.perf_counter() - start
        if tokens:
            store.add_extraction(seconds, tokens, str(teacher.device), batch_size)
    return ExtractReport(store, seconds, tokens, writer.bytes_written, writer.wait_seconds)


def _status(writer: ShardWriter, tokens: int, seconds: float) -> str:
    rate, wait = tokens / seconds, writer.wait_seconds / seconds
    return f"{rate:,.0f} tokens/s · {writer.bytes_written / 1e9:.2f} GB written · disk wait {wait:.0%}"
