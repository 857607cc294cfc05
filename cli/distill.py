"""`kvpipe distill`"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

ALIGNMENT, FUSION, LOSS, TRAINING, EVALUATION = "Alignment", "Several teachers", "KV loss", "Training", "Evaluation"


def distill(
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="How the student's heads meet the teacher's: structured (heads stay heads), flat (one linear map a "
            "layer), flat-global (one for all layers), bottleneck (an MLP), identity, or none (cross-entropy only).",
            rich_help_panel=ALIGNMENT,
        ),
    ] = "structured",
    store: Annotated[
        list[Path] | None,
        typer.Option(
            help="The teacher's KV; of several teachers one --store each, over the same prompts: the student "
            "reads the first one's samples. \\[default: the only store under stores/]"
        ),
    ] = None,
    student: Annotated[str, typer.Option(help="A built-in name, a folder, a config.json or a Hub id.")] = "tiny",
    random_init: Annotated[
        bool, typer.Option("--random-init", help="Start from random weights even where there are trained ones.")
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="The run's folder. \\[default: runs/<mode>-seed<seed>, with fusion and control where there are any]"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already there.")] = False,
    layer_map: Annotated[
        str,
        typer.Option(
            help="Which teacher layers a student layer learns from: ratio, skip, uniform, last, cka, or a JSON file.",
            rich_help_panel=ALIGNMENT,
        ),
    ] = "ratio",
    time_map: Annotated[
        str,
        typer.Option(
            help="For a student with its own tokenizer: span-last, span-mean or segment. auto is identity for equal "
            "tokenizers, else span-last.",
            rich_help_panel=ALIGNMENT,
        ),
    ] = "auto",
    segment_ratio: Annotated[
        str | None,
        typer.Option(
            help="With segment: the first share of a teacher's segment that the student's is stretched over, e.g. "
            "reasoning=0.5,answer=1.",
            rich_help_panel=ALIGNMENT,
        ),
    ] = None,
    segment_interpolation: Annotated[
        str, typer.Option(help="With segment: linear or nearest.", rich_help_panel=ALIGNMENT)
    ] = "linear",
    key_space: Annotated[
        str,
        typer.Option(
            help="post-rope (keys as caches hold them), or pre-rope (both sides without their rotation).",
            rich_help_panel=ALIGNMENT,
        ),
    ] = "post-rope",
    direction: Annotated[
        str,
        typer.Option(
            help="student-to-teacher (the target is fixed), teacher-to-student-frozen (by a closed-form map), or "
            "teacher-to-student-joint (the target may collapse).",
            rich_help_panel=ALIGNMENT,
        ),
    ] = "student-to-teacher",
    share_dim_proj: Annotated[
        bool,
        typer.Option(
            "--share-dim-proj/--per-head-proj",
            help="structured: one channel map for all heads of a layer, or one each.",
            rich_help_panel=ALIGNMENT,
        ),
    ] = True,
    share_layers: Annotated[
        bool,
        typer.Option("--share-layers", help="structured: one projection for all layers.", rich_help_panel=ALIGNMENT),
    ] = False,
    match_params: Annotated[
        str,
        typer.Option(
            help="none, or as many weights as a plain flat or structured projection has: by more terms (structured), "
            "a lower rank (flat) or another width (bottleneck).",
            rich_help_panel=ALIGNMENT,
        ),
    ] = "none",
    start: Annotated[
        str,
        typer.Option(
            help="Of the projection: random, uniform (structured: the mean of the heads) or closed-form.",
            rich_help_panel=ALIGNMENT,
        ),
    ] = "random",
    closed_form: Annotated[
        str,
        typer.Option(
            help="ridge, procrustes or pca (of the teacher): how closed-form starts and frozen maps are fitted.",
            rich_help_panel=ALIGNMENT,
        ),
    ] = "ridge",
    kv_control: Annotated[
        str,
        typer.Option(
            help="Controls: shuffled (the teacher's KV permuted in time) or random (noise of its mean and standard "
            "deviation). Of several stores one word each, as none,shuffled, or one for all.",
            rich_help_panel=ALIGNMENT,
        ),
    ] = "none",
    fusion: Annotated[
        str,
        typer.Option(
            help="How much each of several teachers counts: fixed, similarity (to prototypes of its KV), learned (by a "
            "router) or best-of (by held-out R2, layer by layer).",
            rich_help_panel=FUSION,
        ),
    ] = "fixed",
    fusion_weights: Annotated[
        str | None,
        typer.Option(help="fixed: one number a store, as 2,1. \\[default: all the same]", rich_help_panel=FUSION),
    ] = None,
    fusion_per: Annotated[
        str,
        typer.Option(help="similarity, learned: weights for each layer, sample or token.", rich_help_panel=FUSION),
    ] = "sample",
    fusion_temperature: Annotated[
        float, typer.Option(help="similarity: the higher, the more even the weights.", rich_help_panel=FUSION)
    ] = 0.1,
    fusion_prototypes: Annotated[
        int, typer.Option(help="similarity: by k-means; 1 is the mean.", rich_help_panel=FUSION)
    ] = 1,
    router: Annotated[str, typer.Option(help="learned: linear or mlp.", rich_help_panel=FUSION)] = "linear",
    router_entropy: Annotated[
        float,
        typer.Option(
            help="learned: so much of the weights' entropy off the loss: above 0 for diverse teachers, below for "
            "specialised ones.",
            rich_help_panel=FUSION,
        ),
    ] = 0.0,
    kv_loss: Annotated[
        str,
        typer.Option(
            help="One or more of mse, smooth-l1, mercator, magnitude, hybrid, kava, structural, attention-mse, "
            "relation and cka, each with a weight and a warm-up, as a share of the run, if wanted: mse,cka:0.1:0.2.",
            rich_help_panel=LOSS,
        ),
    ] = "mse",
    kv_segments: Annotated[
        str,
        typer.Option(help="Compare KV on all tokens, or on some of prompt,reasoning,answer.", rich_help_panel=LOSS),
    ] = "all",
    kv_weight: Annotated[
        float, typer.Option(help="Weight of the KV loss beside the cross-entropy.", rich_help_panel=LOSS)
    ] = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Of the student.", rich_help_panel=TRAINING)] = 1e-3,
    aligner_learning_rate: Annotated[
        float | None, typer.Option(help="\\[default: 5 times the student's]", rich_help_panel=TRAINING)
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=TRAINING)] = 0.01,
    warmup_ratio: Annotated[float, typer.Option(help="Share of the steps.", rich_help_panel=TRAINING)] = 0.05,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--per-device-train-batch-size", help="Samples.", rich_help_panel=TRAINING)
    ] = 16,
    epochs: Annotated[
        float, typer.Option("--epochs", "--num-train-epochs", help="Passes over the samples.", rich_help_panel=TRAINING)
    ] = 3.0,
    max_steps: Annotated[
        int,
        typer.Option(
            help="Train for so many steps, whatever --epochs says (-1: as it says).", rich_help_panel=TRAINING
        ),
    ] = -1,
    max_train_tokens: Annotated[
        int | None, typer.Option(help="Train for so many of the student's tokens instead.", rich_help_panel=TRAINING)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Use the first so many training samples. \\[default: all]", rich_help_panel=TRAINING),
    ] = None,
    save_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between checkpoints. \\[default: one an epoch]", rich_help_panel=TRAINING),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            help="Trackers, each with an option of its own: tensorboard, wandb, trackio, mlflow, ...",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    on_collapse: Annotated[
        str,
        typer.Option(help="stop (exit code 3) or warn when the target loses its variance.", rich_help_panel=TRAINING),
    ] = "stop",
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.", rich_help_panel=TRAINING)] = False,
    seed: Annotated[
        int, typer.Option(help="Of the student's start, the aligner's and the data order.", rich_help_panel=TRAINING)
    ] = 0,
    eval_split: Annotated[str, typer.Option(help="test or validation.", rich_help_panel=EVALUATION)] = "test",
    max_new_tokens: Annotated[
        int, typer.Option(help="Length limit of generated answers.", rich_help_panel=EVALUATION)
    ] = 64,
    device: Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train a student from a store. The teacher is never loaded.

    Repeat the command after an interruption: it goes on from its last checkpoint.
    """
    given = locals()

    from ..pipeline.config import DistillConfig
    from ..pipeline.distill import distill as run
    from ..pipeline.distill import find_store
    from ..pipeline.teacher_weights import COLLAPSED, teacher_weights

    config = DistillConfig.from_mapping(
        {field.name: given[field.name] for field in fields(DistillConfig)}, "the command line: {}".format
    )
    stores = store or [find_store(None, "Name one with --store")]
    folder = output_dir or Path("runs") / config.name(len(stores))
    record = run(
        config,
        stores,
        folder,
        device=device,
        overwrite=overwrite,
        save_steps=save_steps,
        report_to=report_to or (),
    )
    metrics, seconds = record["metrics"], record["seconds"]
    weights = teacher_weights(metrics)
    shown = [
        f"{name} {value:.4f}"
        for name, value in metrics.items()
        if value is not None and not name.startswith("fusion_weight")
    ]
    typer.echo(f"{folder}: {', '.join(shown)}")
    typer.echo(
        f"{record['steps']} steps in {seconds['train']:.1f} s, {record['data_wait_share']:.1%} of it waiting for data; "
        f"aligner {record['parameters']['aligner']:,} parameters; teacher forwards: {record['teacher_forwards']}."
    )
    for read in record["stores"]:
        if (coverage := read["token_coverage"]) is not None and coverage < 1:
            typer.echo(
                f"{coverage:.1%} of the student's tokens have a counterpart in {read['path']}, "
                f"{read['one_to_one_share']:.1%} one to one."
            )
    if len(record["stores"]) > 1:
        by_teacher = [f"{Path(read['path']).stem} {w:.2f}" for read, w in zip(record["stores"], weights, strict=False)]
        typer.echo(
            f"{record['common_samples']} of {record['train_samples']} training samples are in all stores"
            + (f"; weights: {', '.join(by_teacher)}." if by_teacher else ".")
        )
    if record["router_collapsed"]:
        sentence = f"The router collapsed: one teacher has more than {COLLAPSED:.0%} of the weight."
        typer.secho(sentence, fg=typer.colors.YELLOW, err=True)
    if record["collapsed"]:
        typer.secho("The distillation target collapsed during this run.", fg=typer.colors.YELLOW, err=True)
    if record["absorbed"]:
        typer.secho(
            "Hardly any of the student's gradient came from the KV loss when last looked at: the aligner absorbs it.",
            fg=typer.colors.YELLOW,
            err=True,
        )
