"""`kvpipe plan`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from . import extract_options as option

if TYPE_CHECKING:
    from ..pipeline.plan import Plan, Rates


def plan(
    model: option.Model,
    dataset: option.DatasetName = "word-problems",
    store: option.Store = None,
    samples: option.Samples = None,
    eval_samples: option.EvalSamples = 256,
    max_tokens: option.MaxTokens = None,
    batch_size: option.BatchSize = "auto",
    dtype: option.Dtype = "auto",
    device: option.Device = "auto",
    codec: option.CodecName = "raw",
    layers: option.Layers = "all",
    segments: option.Segments = "all",
    evict: option.Evict = "none",
    budget: option.Budget = None,
    queries: option.Queries = False,
    max_shard_size: option.MaxShardSize = "64MB",
    revision: option.Revision = None,
    trust_remote_code: option.TrustRemoteCode = False,
    seed: option.Seed = 0,
) -> None:
    """Say what `extract` with these options will take: space, time, and after how many runs it pays off.

    Speeds are measured on a few samples, on this machine and where the store would lie; nothing stays there.
    """
    options = locals()
    from ..pipeline.plan import make_plan

    config = option.extract_config(**options)
    for name, value in _rows(make_plan(config), config.store).items():
        typer.echo(f"{name:22} {value}")


def _rows(plan: Plan, place: Path) -> dict[str, str]:
    cut = f", {plan.truncated:,} cut (--max-tokens)" if plan.truncated else ""
    share = plan.store_bytes / plan.raw_bytes
    queries = f" ({plan.query_bytes / plan.tokens:,.0f} of them queries)" if plan.query_bytes else ""
    left = f", {_bytes(plan.missing_bytes)} still to be written" if plan.missing_bytes < plan.store_bytes else ""
    free = f"{_bytes(plan.free_bytes)} free: {'it fits' if plan.fits else 'it does not fit'}"
    return {
        "samples": f"{plan.samples:,}, {plan.tokens:,} tokens{cut}",
        "bytes a token": f"{plan.store_bytes / plan.tokens:,.0f}{queries}, {share:.2f} of a raw store of all layers",
        "store": f"{_bytes(plan.store_bytes)} at {place}{left}, {free}",
        **_speed_rows(plan.rates, plan.tokens),
    }


def _speed_rows(rates: Rates | None, tokens: int) -> dict[str, str]:
    if rates is None:
        return {"speeds": "not measured: a few samples do not fit, or have nothing to keep"}
    never = "never: reading is no faster than the teacher here"
    return {
        "teacher alone": _time(tokens, rates.forward),
        "extraction": _time(tokens, rates.extract),
        "reading it": _time(tokens, rates.read),
        "pays off": f"from run {rates.break_even} on, where each is one teacher pass" if rates.break_even else never,
    }


def _time(tokens: int, rate: float) -> str:
    seconds = tokens / rate
    shown = f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 3600:,.1f} h"
    return f"{shown} ({rate:,.0f} tokens/s)"


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"
