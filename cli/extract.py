"""`kvpipe extract`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import extract_options as option

if TYPE_CHECKING:
    from ..pipeline.teacher_pass import ExtractReport


def extract(
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
    reasoning: option.Reasoning = "dataset",
    temperature: option.Temperature = 0.0,
    max_new_tokens: option.MaxNewTokens = 256,
    wrong_answers: option.WrongAnswers = "drop",
    seed: option.Seed = 0,
    on_nonfinite: Annotated[
        str, typer.Option(help="exclude a sample whose KV has NaN or infinity, or stop there.")
    ] = "exclude",
) -> None:
    """Run the teacher once and store its KV cache.

    Repeat the command after an interruption: it goes on where it stopped. Several GPUs share the work under a launcher:
    torchrun --nproc-per-node 8 --no-python kvpipe extract ...
    """
    options = locals()
    from ..kvcache.writer import OnNonfinite
    from ..pipeline.extract import extract as run
    from ..pipeline.extract_config import Reasoning, WrongAnswers
    from ..pipeline.ranks import is_main_process
    from .parse import one_of

    for name, words in (("on_nonfinite", OnNonfinite), ("reasoning", Reasoning), ("wrong_answers", WrongAnswers)):
        options[name] = one_of(words, options[name], f"--{name.replace('_', '-')}")
    report = run(option.extract_config(**options))
    if is_main_process():
        _show(report)


def _show(report: ExtractReport) -> None:
    from ..pipeline.ranks import world_size

    store = report.store
    evicted = int((store.kv_length == 0).sum())
    if evicted:
        typer.echo(f"{evicted} of {store.num_samples} samples are excluded: they have no tokens of these segments.")
    if excluded := len(store.excluded) - evicted:
        scales = " or beyond float16 in its scales" if store.codec.lossy else ""
        what = "KV or a query" if store.manifest.queries else "KV"
        typer.echo(
            f"{excluded} of {store.num_samples} samples are excluded: the teacher's {what} is NaN or infinite in "
            f"{store.manifest.dtype}{scales}.",
        )
    if store.wrong_answers:
        problems, dropped = store.manifest.dataset.num_samples, store.num_samples < store.manifest.dataset.num_samples
        typer.echo(
            f"{store.wrong_answers} of {problems} problems have another answer than the teacher gave"
            f"{', and are left out' if dropped else ''} (--wrong-answers)."
        )
    if store.truncated:
        typer.echo(
            f"{store.truncated} of {store.num_samples} samples were cut at {store.manifest.max_tokens} tokens "
            "(--max-tokens)."
        )
    if report.teacher_tokens == 0:
        typer.echo(f"{store.path} is already complete; the teacher had nothing to do.")
        return
    total = int(store.length.sum())
    resumed = f" of {total:,}" if report.teacher_tokens < total else ""
    # The report's seconds are those of all processes together.
    time, rate = ("s", "tokens/s") if world_size() == 1 else ("device-seconds", "tokens/s a device")
    typer.echo(
        f"{store.path}: {store.num_samples} samples, {report.teacher_tokens:,}{resumed} tokens in "
        f"{report.seconds:.1f} {time} ({report.teacher_tokens / report.seconds:,.0f} {rate}), "
        f"{report.bytes_written / 1e6:,.1f} MB written, {report.wait_seconds / report.seconds:.1%} waiting for disk."
    )
