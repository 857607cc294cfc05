"""`kvpipe extract`"""

from __future__ import annotations

from typing import Annotated

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


def extract(
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
    max_shard_size: Annotated[
        str, typer.Option(help="Raw KV of all layers in a shard, e.g. 64MB or 1GB. A codec makes the file smaller.")
    ] = "64MB",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    on_nonfinite: Annotated[
        str, typer.Option(help="exclude a sample whose KV has NaN or infinity, or stop there.")
    ] = "exclude",
) -> None:
    """Run the teacher once and store its KV cache.

    Repeat the command after an interruption: it goes on where it stopped. Several GPUs share the work under a launcher:
    torchrun --nproc-per-node 8 --no-python kvpipe extract ...
    """
    from ..pipeline.extract import extract as run
    from ..pipeline.extract_config import ExtractConfig, default_store
    from ..pipeline.ranks import is_main_process
    from .parse import batch_size_or_auto, exclude_or_stop, size_in_bytes

    report = run(
        ExtractConfig(
            model=model,
            store=store or default_store(model),
            dataset=dataset,
            samples=samples,
            eval_samples=eval_samples,
            max_tokens=max_tokens,
            dtype=dtype,
            device=device,
            batch_size=batch_size_or_auto(batch_size),
            max_shard_bytes=size_in_bytes(max_shard_size),
            revision=revision,
            trust_remote_code=trust_remote_code,
            seed=seed,
            on_nonfinite=exclude_or_stop(on_nonfinite),
            codec=codec,
            layers=layers,
        )
    )
    if not is_main_process():
        return
    if excluded := len(report.store.excluded):
        typer.echo(
            f"{excluded} of {report.store.num_samples} samples are excluded: the teacher's KV is NaN or infinite "
            f"in {report.store.manifest.dtype}.",
        )
    if report.store.truncated:
        typer.echo(
            f"{report.store.truncated} of {report.store.num_samples} samples were cut at "
            f"{report.store.manifest.max_tokens} tokens (--max-tokens)."
        )
    if report.teacher_tokens == 0:
        typer.echo(f"{report.store.path} is already complete; the teacher had nothing to do.")
        return
    total = int(report.store.length.sum())
    resumed = f" of {total:,}" if report.teacher_tokens < total else ""
    typer.echo(
        f"{report.store.path}: {report.store.num_samples} samples, {report.teacher_tokens:,}{resumed} tokens in "
        f"{report.seconds:.1f} s ({report.teacher_tokens / report.seconds:,.0f} tokens/s), "
        f"{report.bytes_written / 1e6:,.1f} MB written, {report.wait_seconds / report.seconds:.1%} waiting for disk."
    )
