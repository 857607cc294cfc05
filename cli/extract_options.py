"""The options that `kvpipe extract` and `kvpipe plan` share, and what they make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..pipeline.extract_config import ExtractConfig

Model = Annotated[
    str, typer.Option("--model", help="Teacher: a built-in name (`kvpipe models`), a folder or a Hub id.")
]
DatasetName = Annotated[
    str,
    typer.Option("--dataset", help="word-problems, word-problems-long (built in), a .jsonl file, or a Hub data set."),
]
Store = Annotated[Path | None, typer.Option("--store", help="Where the store goes. \\[default: stores/<model>.zarr]")]
Samples = Annotated[
    int | None,
    typer.Option("--samples", help="Limit of training samples. \\[default: 4000 built-in ones, or a whole file]"),
]
EvalSamples = Annotated[int, typer.Option("--eval-samples", help="Held-out samples for each of validation and test.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", help="Longer samples are cut, and counted. \\[default: 1024, or what the model can read]"
    ),
]
BatchSize = Annotated[
    str, typer.Option("--batch-size", help="Samples in a forward pass, or auto: by a budget of padded tokens.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto (the model's own), float32, float16 or bfloat16. CPUs that lack it compute in float32."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto (CUDA where there is one), cpu, cuda or cuda:N.")]
CodecName = Annotated[
    str,
    typer.Option("--codec", help="How KV is kept: raw (exact), or lossy in fewer bits: fp8, int8, int4, int3, int2."),
]
Layers = Annotated[
    str,
    typer.Option(
        "--layers",
        help="Teacher layers to keep: all; numbers from 0, as in 1,3,8-11; or ratio:N, those that a student of N "
        "layers learns from.",
    ),
]
Segments = Annotated[
    str, typer.Option("--segments", help="Keep the KV of these tokens only: all, or some of prompt,reasoning,answer.")
]
Evict = Annotated[
    str,
    typer.Option("--evict", help="Keep the KV of fewer tokens, chosen by: rkv (R-KV), right-crop or random; none."),
]
Budget = Annotated[
    str | None,
    typer.Option("--budget", help="With --evict: tokens kept of a sample, as a share (0.5) or a number (128)."),
]
MaxShardSize = Annotated[
    str,
    typer.Option(
        "--max-shard-size",
        help="Raw KV of all layers in a shard, e.g. 64MB or 1GB. A codec makes the file smaller; a store that is there "
        "keeps its own.",
    ),
]
Queries = Annotated[
    bool,
    typer.Option("--queries", help="Keep the queries too, for KV losses that compare attention. The store is larger."),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub model.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let a Hub model run its own code.")]
Reasoning = Annotated[
    str, typer.Option("--reasoning", help="dataset: as the data set has it; teacher: the teacher writes its own.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", help="With --reasoning teacher: 0 is greedy, else it is sampled by --seed.")
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", help="With --reasoning teacher: where the teacher is stopped.")
]
WrongAnswers = Annotated[
    str, typer.Option("--wrong-answers", help="With --reasoning teacher: drop or keep what it answers wrong.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the built-in data set, and of sampled reasoning.")]


def extract_config(
    *, model: str, store: Path | None, batch_size: str, budget: str | None, max_shard_size: str, **options: Any
) -> ExtractConfig:
    """The extraction that a command line asks for; `options` are fields of ExtractConfig as they are."""
    from ..pipeline.extract_config import ExtractConfig, default_store
    from .parse import batch_size_or_auto, share_or_number, size_in_bytes

    return ExtractConfig(
        model=model,
        store=store or default_store(model),
        batch_size=batch_size_or_auto(batch_size),
        budget=share_or_number(budget),
        max_shard_bytes=size_in_bytes(max_shard_size),
        **options,
    )
