"""Stage two: a student learns from the store. The teacher is never loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..data.batching import ShuffledBatches
from ..kvcache.align.layer_map import write_layer_map
from ..kvcache.errors import DivergenceError, StoreError
from ..kvcache.files import write_atomic
from ..kvcache.lock import only_writer
from ..kvcache.manifest import hash_config, hash_json, hash_weights
from ..kvcache.store import KVStore
from .callbacks import MetricsFile, TrainingProgress
from .compatibility import require_learnable, require_positions, student_text, train_indices
from .config import DistillConfig
from .distiller import KVDistiller
from .evaluate import SampleScore, evaluate_answers, evaluate_tokens
from .fused_alignment import build_fused_distiller, fused_dataset, fused_training_dataset
from .fused_dataset import FusedDataset
from .matched_stores import MatchedStore, common_samples, match_stores
from .models import load_student, resolve_device, tokenizer_from_files
from .progress import progress_bar
from .ranks import require_one_process
from .run_checkpoints import SealedCheckpoints, last_checkpoint
from .run_clock import RunClock
from .run_directory import RunDirectory, run_identity
from .run_record import description, store_read
from .teacher_weights import is_collapsed, teacher_weights
from .trackers import require_trackers
from .trainer import DistillTrainer
from .training_data import KVDataset

EVAL_EVERY = 1 / 8
"""Share of the steps between two points of the learning curve."""


def find_store(store: Path | None, remedy: str = "Name one after the command") -> Path:
    """The store to read: the one named, or the only one under `stores/`. Raises StoreError, with what to do, where
    there is not exactly one."""
    if store is not None:
        return store
    found = sorted(Path("stores").glob("*.zarr"))
    if len(found) != 1:
        raise StoreError(
            "no single store to read",
            expected="exactly one under stores/",
            found=", ".join(map(str, found)) or "none",
            remedy=f"{remedy}, or write one with `kvpipe extract`",
        )
    return found[0]


def distill(
    config: DistillConfig,
    store_paths: Sequence[Path],
    run_dir: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    save_steps: int | None = None,
    report_to: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one student from one store or several and return its run record, also written to `run_dir`. The first
    store's samples are what the student reads and learns; another's are matched with them.

    A checkpoint is written every `save_steps` steps, by default after every epoch; `report_to` names installed
    trackers. A finished run is returned as it is; an interrupted one goes on from its last checkpoint. Raises
    ConfigError, ModelError or StoreError for what the user can mend, CollapseError for a collapsed target.
    """
    require_one_process("distill")
    require_trackers(report_to)
    config.require_fusion(len(store_paths))
    clock = RunClock()
    resolved = resolve_device(device)
    stores = [KVStore.open(path) for path in store_paths]
    for store in stores:
        store.require_complete()
    run, identity = RunDirectory(run_dir), run_identity(config, stores)
    if overwrite:
        run.require_outside([*store_paths, Path(config.student)])
    run.require_free(identity, overwrite=overwrite)
    if not overwrite and (record := run.read_record()) is not None:
        run.require_outputs(record)
        return record
    with only_writer(run_dir):
        checkpoint = None if overwrite else last_checkpoint(run.checkpoints, identity)
        parts = _build(config, stores, resolved)
        # Only now, when nothing the user can mend stands in the way, does the folder change.
        run.claim(identity, overwrite=overwrite)
        arguments = _arguments(config, parts, run, resolved, save_steps, report_to)
        trainer = _trainer(parts, config, arguments, run, identity, clock)
        clock.lap("setup")
        with progress or progress_bar() as bar:
            trainer.add_callback(TrainingProgress(bar, run.name))
            trainer.run(checkpoint)
        clock.lap("train")
        record = {
            **_outcome(parts, config, run, trainer),
            "student": identity["student"],
            "resumed_from": checkpoint.name if checkpoint is not None else None,
            **description(parts.distiller, trainer, config, resolved),
        }
        _save(parts, run)
        clock.lap("evaluation")
        return run.finish({**record, **clock.costs()})


@dataclass(frozen=True)
class _Parts:
    """What a run is made of."""

    distiller: KVDistiller
    tokenizer: PreTrainedTokenizerBase
    stores: list[MatchedStore]
    data: KVDataset | FusedDataset
    batches: ShuffledBatches
    eval_data: KVDataset | FusedDataset
    train: list[int]
    held_out: list[int]
    pairing: dict[str, str]

    def stores_read(self, config: DistillConfig) -> list[dict[str, Any]]:
        """What `run.json` says of every store."""
        datasets = self.data.datasets if isinstance(self.data, FusedDataset) else [self.data]
        return [
            store_read(read.store, data.coverage(read.of(self.train)) if config.mode != "none" else None)
            for read, data in zip(self.stores, datasets, strict=True)
        ]

    def evaluate(self, distiller: KVDistiller) -> tuple[dict[str, float], list[SampleScore]]:
        return evaluate_tokens(distiller, self.eval_data, self.held_out)


def _build(config: DistillConfig, stores: Sequence[KVStore], device: torch.device) -> _Parts:
    store = stores[0]
    teachers_tokenizer = tokenizer_from_files(store.tokenizer_files())
    student = load_student(config.student, teachers_tokenizer, random_init=config.random_init, seed=config.seed)
    text, tokenizer = student_text(config, store, student)
    require_positions(student, store, text)
    train, held_out = train_indices(store, config).tolist(), store.indices(config.eval_split).tolist()
    for split, indices in (("train", train), (config.eval_split, held_out)):
        require_learnable(store, split, indices)
    matched = match_stores(stores, text)
    batches = ShuffledBatches(np.asarray(train), text.length, config.batch_size, config.seed, store.layout.samples)
    # What two runs must share to be compared as a pair.
    pairing = {
        "student_init": hash_json([hash_config(student.config), hash_weights(student.state_dict().items())])[:16],
        "data_order": hash_json(list(batches))[:16],
        "eval_samples": hash_json([store.records[index] for index in held_out])[:16],
    }
    return _Parts(
        build_fused_distiller(config, matched, student.to(device), train),
        tokenizer,
        matched,
        fused_training_dataset(config, matched, train),
        batches,
        fused_dataset(config, matched),
        train,
        held_out,
        pairing,
    )


def _trainer(
    parts: _Parts,
    config: DistillConfig,
    arguments: TrainingArguments,
    run: RunDirectory,
    identity: dict[str, Any],
    clock: RunClock,
) -> DistillTrainer:
    trainer = DistillTrainer(
        parts.distiller,
        arguments,
        config,
        parts.data,
        parts.batches,
        lambda distiller: parts.evaluate(distiller)[0],
        clock,
    )
    trainer.add_callback(MetricsFile(run.metrics))
    trainer.add_callback(SealedCheckpoints(identity))
    return trainer


def _arguments(
    config: DistillConfig,
    parts: _Parts,
    run: RunDirectory,
    device: torch.device,
    save_steps: int | None,
    report_to: Sequence[str],
) -> TrainingArguments:
    tokens = config.max_train_tokens
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps if tokens is None else parts.batches.steps_for(tokens),
        include_num_input_tokens_seen="non_padding",
        seed=config.seed,
        bf16=config.bf16,
        logging_steps=10,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=EVAL_EVERY,
        save_strategy="epoch" if save_steps is None else "steps",
        save_steps=save_steps or 1,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        report_to=list(report_to) or "none",
        run_name=run.name,
        disable_tqdm=True,
    )
    if device.type == "cuda":
        # One process, one GPU, and the one that was asked for: TrainingArguments picks the first, and DataParallel
        # over several would cut the KV along its key/value axis.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        arguments.__dict__["_setup_devices"] = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device.index or 0)
    return arguments


def _outcome(parts: _Parts, config: DistillConfig, run: RunDirectory, trainer: DistillTrainer) -> dict[str, Any]:
    """What was read, what came out of it, and what makes the run one of a pair."""
    metrics = _final_metrics(parts, config, run, trainer.state.global_step)
    return {
        "name": run.name,
        "stores": parts.stores_read(config),
        "train_samples": len(parts.train),
        "common_samples": common_samples(parts.stores, parts.train),
        "metrics": metrics,
        "router_collapsed": config.routes and is_collapsed(teacher_weights(metrics)),
        "pairing": parts.pairing,
    }


def _final_metrics(parts: _Parts, config: DistillConfig, run: RunDirectory, steps: int) -> dict[str, float | None]:
    """Everything on the held-out split, generation included; each sample goes to `predictions.jsonl`."""
    tokens, samples = parts.evaluate(parts.distiller)
    if not math.isfinite(tokens["ce"]):
        raise DivergenceError(steps)
    student = parts.distiller.student
    store, text = parts.stores[0].store, parts.eval_data.text
    answers = evaluate_answers(student, parts.tokenizer, store, text, parts.held_out, config.max_new_tokens)
    lines = []
    for index, sample in zip(parts.held_out, samples, strict=True):
        generated, exact = answers.get(index, (None, None))
        line = {"id": store.records[index]["id"], **asdict(sample), "generated": generated, "exact": exact}
        lines.append(f"{json.dumps(line)}\n")
    write_atomic(run.predictions, "".join(lines).encode())
    exact_match = sum(exact for _, exact in answers.values()) / len(answers) if answers else None
    return {**tokens, "exact_match": exact_match}


def _save(parts: _Parts, run: RunDirectory) -> None:
    """The student as `from_pretrained` reads it, with its tokenizer; for every teacher its aligner, and which of its
    layers the student learned from."""
    student, tokenizer = parts.distiller.student, parts.tokenizer
    student.generation_config.eos_token_id = tokenizer.eos_token_id
    student.generation_config.pad_token_id = tokenizer.pad_token_id
    # A file in its place is an error of save_pretrained's log alone.
    run.student.mkdir(exist_ok=True)
    student.save_pretrained(run.student)
    tokenizer.save_pretrained(run.student)
    for folder, matched, teacher in zip(
        run.teachers(len(parts.stores)), parts.stores, parts.distiller.teachers, strict=True
    ):
        folder.mkdir(exist_ok=True)
        if teacher.aligner is not None:
            teacher.aligner.save(folder)
        manifest = matched.store.manifest
        layers = teacher.view.layer_map.expand(manifest.layers, manifest.teacher.num_layers)
        write_layer_map(layers, folder / "layer_map.json")
