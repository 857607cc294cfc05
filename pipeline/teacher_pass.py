"""The teacher reads what a store lacks, and its KV goes there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from rich.filesize import decimal
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batching import length_batches
from ..data.sample import Segment
from ..kvcache.capture import CaptureCache
from ..kvcache.evict import Observed, choose_tokens, require_policy
from ..kvcache.layout import Pairs, layer_pairs, take_tokens
from ..kvcache.manifest import Manifest
from ..kvcache.queries import recorded_queries
from ..kvcache.staging import finite_samples
from ..kvcache.store import KVStore
from ..kvcache.writer import OnNonfinite, ShardWriter
from .ranks import ONE_PROCESS, Ranks

AUTO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Padded tokens in a batch under `--batch-size auto`."""

WINDOW_BATCHES = 8
"""Samples are grouped by length within windows of whole shards that hold about this many batches."""

MAX_OPEN_SHARDS = 64
"""Shards of a window are written side by side, each through file handles of its own."""


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


def capture_samples(store: KVStore, teacher: PreTrainedModel, batch: list[int]) -> Pairs:
    """The same of some samples of a store, padded at the end to the longest."""
    length = torch.from_numpy(store.length[batch])
    ids = torch.from_numpy(store.input_id_rows.take(batch).astype(np.int64))
    mask = (torch.arange(ids.shape[1])[None] < length[:, None]).long()
    return capture_kv(teacher, ids.to(teacher.device), mask.to(teacher.device))


def eligible_tokens(segment_ids: NDArray[np.int8], segments: Sequence[str]) -> NDArray[np.bool_]:
    """Which tokens, of any shape, are of the segments whose KV is kept."""
    # Not by `np.isin`, which takes eight bytes a token: there may be very many.
    eligible = np.zeros(segment_ids.shape, np.bool_)
    for name in segments:
        eligible |= segment_ids == Segment[name.upper()]
    return eligible


Captured = tuple[Pairs, Tensor | None, Tensor | None, list[Tensor] | None]
"""What `ShardWriter.put` takes of a batch: key and value `[B, H, T, D]` of the layers and tokens that a store keeps;
where tokens are evicted, the positions `[B, T]` of the rest and which samples were finite `[B]`; and for a store that
keeps queries those of the same layers and tokens, `[B, Hq, T, D]`."""


def read_samples(store: KVStore, teacher: PreTrainedModel, batch: list[int]) -> Captured:
    """What a store keeps of some samples, from the teacher's forward over them."""
    length = torch.from_numpy(store.length[batch])
    policy = require_policy(store.manifest.eviction)
    window = length[:, None] - policy.window + torch.arange(policy.window)
    pairs, queries = _forward(store, teacher, batch, window)
    beside = queries if store.manifest.queries else None
    if not store.evicts:
        return pairs, None, None, beside
    seen = queries if beside is None else [take_tokens(query, window.to(query.device)) for query in beside]
    scores = policy.scores(Observed(batch, length, pairs, store.manifest.seed, seen, window))
    eligible = torch.from_numpy(eligible_tokens(store.segment_id_rows.take(batch), store.manifest.segments))
    counts = torch.from_numpy(store.kv_length[batch])
    positions = choose_tokens(scores, eligible.to(scores.device), counts).to(teacher.device)
    finite = finite_samples(chain(*pairs, beside or []), length)
    kept = [(take_tokens(key, positions), take_tokens(value, positions)) for key, value in pairs]
    return kept, positions, finite, beside and [take_tokens(query, positions) for query in beside]


def _forward(
    store: KVStore, teacher: PreTrainedModel, batch: list[int], window: Tensor
) -> tuple[Pairs, list[Tensor] | None]:
    """Of the layers that a store keeps, key and value of all tokens; and the queries, of all tokens where the store
    keeps them, or at the places `window` that its policy looks at, if any."""
    layers = store.manifest.layers
    places = None if store.manifest.queries else window
    with recorded_queries(teacher, places, layers) if needs_queries(store.manifest) else nullcontext() as recorded:
        every_layer = capture_samples(store, teacher, batch)
    # The teacher may compute in more bits than are kept.
    queries = None if recorded is None else [recorded[layer].to(store.dtype) for layer in layers]
    pairs = [(key.to(store.dtype), value.to(store.dtype)) for key, value in (every_layer[layer] for layer in layers)]
    return pairs, queries


def needs_queries(manifest: Manifest) -> bool:
    """Whether an extraction keeps the teacher's queries, or looks at some."""
    return manifest.queries or require_policy(manifest.eviction).window > 0


def plan_windows(store: KVStore, batch_size: int | None, device: torch.device) -> list[range]:
    """The shards of a store in runs, within which samples are grouped by length."""
    mean_batch = batch_size or max(1, AUTO_BATCH_TOKENS[device.type] // int(store.length.mean()))
    one_batch, window = (-(-count * mean_batch // store.layout.samples) for count in (1, WINDOW_BATCHES))
    window = max(min(window, MAX_OPEN_SHARDS), one_batch)
    return [range(first, min(first + window, store.num_shards)) for first in range(0, store.num_shards, window)]


def plan_batches(
    store: KVStore, windows: Iterable[range], batch_size: int | None, device: torch.device, missing: set[int]
) -> Iterator[list[int]]:
    """The batches that fill the `missing` shards of some windows.

    A batch's samples depend on the store's lengths, the batch size and the kind of device alone, never on what is
    already written or on how many processes share the work: a resumed extraction repeats the very same forwards, so it
    ends with the very same bytes.
    """
    for window in windows:
        samples = range(store.shard_samples(window[0]).start, store.shard_samples(window[-1]).stop)
        for batch in length_batches(samples, store.length, batch_size, AUTO_BATCH_TOKENS[device.type]):
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
    ranks: Ranks = ONE_PROCESS,
) -> ExtractReport:
    """Write every shard that is not in the ledger; `batch_size` None goes by a budget of padded tokens.

    Each rank writes whole windows of its own. The report is that of all of them, its seconds those of every device.
    """
    windows = plan_windows(store, batch_size, teacher.device)[ranks.index :: ranks.count]
    missing = set(chain.from_iterable(windows)) - store.finished_shards()
    batches = list(plan_batches(store, windows, batch_size, teacher.device, missing))
    total = int(store.length[list(chain.from_iterable(batches))].sum())
    task = progress.add_task("extract", total=total, status="", visible=bool(batches))
    if batches and ranks.is_main:
        # Killed or not, `repair` has to know the batches.
        store.add_extraction(0.0, 0, str(teacher.device), batch_size)
    start, seconds, tokens = time.perf_counter(), 0.0, 0.0
    try:
        with ShardWriter(store, missing, on_nonfinite=on_nonfinite) as writer:
            for batch in batches:
                writer.put(batch, *read_samples(store, teacher, batch))
                tokens += int(store.length[batch].sum())
                seconds = time.perf_counter() - start
                progress.update(task, completed=tokens, status=_status(writer, tokens, seconds))
        if batches:
            seconds = time.perf_counter() - start
        seconds, tokens, written, waited = ranks.totals(seconds, tokens, writer.bytes_written, writer.wait_seconds)
    finally:
        # An interrupted run has cost the teacher's time as well. (Of other ranks nothing is known then.)
        if tokens and ranks.is_main:
            store.add_extraction(seconds, int(tokens), str(teacher.device), batch_size)
    return ExtractReport(store, seconds, int(tokens), int(written), waited)


def _status(writer: ShardWriter, tokens: float, seconds: float) -> str:
    rate, wait = tokens / seconds, writer.wait_seconds / seconds
    return f"{rate:,.0f} tokens/s · {decimal(writer.bytes_written)} written · disk wait {wait:.0%}"
