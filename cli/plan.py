"""`kvpipe plan`"""

from __future__ import annotations

import typer

from .extract_options import (
    BatchSize,
    CodecName,
    DatasetName,
    Device,
    Dtype,
    EvalSamples,
    Layers,
    MaxTokens,
    Model,
    Revision,
    Samples,
    Seed,
    Store,
    TrustRemoteCode,
)


def plan(
    model: Model,
    dataset: DatasetName = "word-problems",
    store: Store = None,
    samples: Samples = None,
    eval_samples: EvalSamples = 256,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    codec: CodecName = "raw",
    layers: Layers = "all",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
) -> None:
    """Say what `extract` with the same options will take: space, time, and after how many runs it pays off.

    Speeds are measured on a few samples, on this machine and where the store would lie; nothing stays there.
    """
    from ..pipeline.extract_config import ExtractConfig, default_store
    from ..pipeline.plan import make_plan
    from .parse import batch_size_or_auto

    place = store or default_store(model)
    found = make_plan(
        ExtractConfig(
            model=model,
            store=place,
            dataset=dataset,
            samples=samples,
            eval_samples=eval_samples,
            max_tokens=max_tokens,
            dtype=dtype,
            device=device,
            batch_size=batch_size_or_auto(batch_size),
            revision=revision,
            trust_remote_code=trust_remote_code,
            seed=seed,
            codec=codec,
            layers=layers,
        )
    )
    rows = {
        "samples": f"{found.samples:,}, {found.tokens:,} tokens"
        + (f", {found.truncated:,} cut (--max-tokens)" if found.truncated else ""),
        "bytes a token": f"{found.store_bytes / found.tokens:,.0f}, {found.store_bytes / found.raw_bytes:.2f} of raw "
        "KV of all layers",
        "store": f"{_bytes(found.store_bytes)} at {place}, {_bytes(found.free_bytes)} free: "
        + ("it fits" if found.fits else "it does not fit"),
        "teacher alone": _time(found.tokens, found.forward_rate),
        "extraction": _time(found.tokens, found.extract_rate),
        "reading it": _time(found.tokens, found.read_rate),
        "pays off": f"from {found.break_even} runs on, of one teacher pass each"
        if found.break_even
        else "never: reading is no faster than the teacher here",
    }
    for name, value in rows.items():
        typer.echo(f"{name:22} {value}")


def _time(tokens: int, rate: float) -> str:
    seconds = tokens / rate
    shown = f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 3600:,.1f} h"
    return f"{shown} ({rate:,.0f} tokens/s)"


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"
