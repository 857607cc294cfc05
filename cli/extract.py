"""`kvpipe extract`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def extract(
    model: Annotated[
        str, typer.Option("--model", help="Teacher: a built-in name (`kvpipe models`), a folder or a Hub id.")
    ],
    dataset: Annotated[
        str, typer.Option(help="word-problems (built in), a .jsonl file, or a Hub data set.")
    ] = "word-problems",
    store: Annotated[Path | None, typer.Option(help="Where the store goes. [default: stores/<model>.zarr]")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Limit of training samples. [default: 4000 built-in ones, or a whole file]")
    ] = None,
    eval_samples: Annotated[int, typer.Option(help="Held-out samples for each of validation and test.")] = 256,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Longer samples are cut, and counted. [default: 1024, or what the model can read]"),
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="Samples in a forward pass, or auto: by a budget of padded tokens.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the model's own), float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.")] = "auto",
    codec: Annotated[
        str, typer.Option(help="How KV is kept: raw (exact), or lossy in fewer bits: fp8, int8, int4, int2.")
    ] = "raw",
    layers: Annotated[
        str,
        typer.Option(
            help="Teacher layers to keep: all; numbers from 0, as in 1,3,8-11; or ratio:N, those that a student of N "
            "layers learns from."
        ),
    ] = "all",
    max_shard_size: Annotated[
        str, typer.Option(help="Raw KV of all layers in a shard, e.g. 64MB or 1GB. A codec makes the file smaller.")
    ] = "64MB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a Hub model run its own code.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the built-in data set.")] = 0,
    on_nonfinite: Annotated[
        str, typer.Option(help="exclude a sample whose KV has NaN or infinity, or stop there.")
    ] = "exclude",
) -> None:
    """Run the teacher once and store its KV cache.

    Repeat the command after an interruption: it goes on where it stopped. Several GPUs share the work under a launcher:
    torchrun --nproc-per-node 8 --no-python kvpipe extract ...
    """
    from ..pipeline.extract import ExtractConfig, default_store
    from ..pipeline.extract import extract as run
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
