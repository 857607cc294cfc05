"""Stage two: a student learns from the store. The teacher is never loaded."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from ..data.batching import ShuffledBatches
from ..kvcache.align.aligner import Aligner, AlignerConfig
from ..kvcache.align.head_projection import KVSpace
from ..kvcache.align.layer_map import ratio_map
from ..kvcache.errors import DivergenceError, StoreError
from ..kvcache.files import write_atomic
from ..kvcache.lock import only_writer
from ..kvcache.manifest import hash_json, hash_weights
from ..kvcache.store import KVStore
from .callbacks import MetricsFile, TrainingProgress
from .compatibility import require_learnable, require_positions, require_same_tokenizer, stored_layers, train_indices
from .config import DistillConfig
from .distiller import KVDistiller
from .evaluate import evaluate_answers, evaluate_tokens
from .models import load_student, resolve_device, tokenizer_from_files
from .progress import progress_bar
from .ranks import require_one_process
from .run_checkpoints import SealedCheckpoints, last_checkpoint
from .run_directory import RunDirectory, run_identity
from .run_record import costs, description, store_read
from .trainer import DistillTrainer
from .training_data import KVDataset, teacher_moments


def find_store(store: Path | None) -> Path:
    """The store to read: the one named, or the only one under `stores/`."""
    if store is not None:
        return store
    found = sorted(Path("stores").glob("*.zarr"))
    if len(found) != 1:
        raise StoreError(
            "no single store to read",
            expected="exactly one under stores/",
            found=", ".join(map(str, found)) or "none",
            remedy="Name one with --store, or write one with `kvpipe extract`",
        )
    return found[0]


def distill(
    config: DistillConfig,
    store_path: Path,
    run_dir: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    save_steps: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one student and return its run record, also written to `run_dir`.

    A checkpoint is written every `save_steps` steps, by default after every epoch. A finished run is returned as it
    is; an interrupted one goes on from its last checkpoint. Raises ConfigError, ModelError or StoreError for what
    the user can mend, CollapseError for a collapsed target.
    """
    require_one_process("distill")
    started = time.perf_counter()
    resolved = resolve_device(device)
    store = KVStore.open(store_path)
    store.require_complete()
    run, identity = RunDirectory(run_dir), run_identity(config, store)
    run.require_free(identity, overwrite=overwrite)
    if not overwrite and (record := run.read_record()) is not None:
        run.require_outputs(record)
        return record
    with only_writer(run_dir):
        checkpoint = None if overwrite else last_checkpoint(run.checkpoints, identity)
        parts = _build(config, store)
        # Only now, when nothing the user can mend stands in the way, does the folder change.
        run.claim(identity, overwrite=overwrite)
        trainer = _trainer(parts, config, _arguments(config, run, resolved, save_steps), run, identity)
        setup_done = time.perf_counter()
        with progress or progress_bar() as bar:
            trainer.add_callback(TrainingProgress(bar, run_dir.name))
            trainer.run(checkpoint)
        train_done = time.perf_counter()
        metrics = _final_metrics(parts, store, config, run, trainer.state.global_step)
        _save(parts, run)
        record = {
            "name": run_dir.name,
            "store": store_read(store),
            "resumed_from": checkpoint.name if checkpoint is not None else None,
            "metrics": metrics,
            **description(parts.distiller, trainer, config, resolved),
            "pairing": parts.pairing,
            **costs(trainer, started, setup_done, train_done),
        }
        return run.finish(record)


@dataclass(frozen=True)
class _Parts:
    """What a run is made of."""

    distiller: KVDistiller
    tokenizer: PreTrainedTokenizerBase
    data: KVDataset
    batches: ShuffledBatches
    held_out: list[int]
    evaluate: Callable[[KVDistiller], tuple[dict[str, float], list[float]]]
    pairing: dict[str, str]


def _build(config: DistillConfig, store: KVStore) -> _Parts:
    tokenizer = tokenizer_from_files(store.tokenizer_files())
    student = load_student(config.student, tokenizer, random_init=config.random_init, seed=config.seed)
    require_same_tokenizer(config, student, len(tokenizer), store)
    require_positions(student, store)
    train, held_out = train_indices(store, config), store.indices(config.eval_split).tolist()
    for split, indices in (("train", train), (config.eval_split, held_out)):
        require_learnable(store, split, indices)
    batches = ShuffledBatches(train, store.length, config.batch_size, config.seed, store.layout.samples)
    # What two runs must share to be compared as a pair.
    pairing = {
        "student_init": hash_weights(student.state_dict().items())[:16],
        "data_order": hash_json(list(batches))[:16],
        "eval_samples": hash_json(held_out)[:16],
    }
    num_layers = student.config.get_text_config(decoder=True).num_hidden_layers
    layer_map = stored_layers(store, ratio_map(num_layers, store.manifest.teacher.num_layers))
    distiller = KVDistiller(student, _build_aligner(config, store, student, layer_map, train), config.kv_weight)
    eval_data = KVDataset(store, with_kv=True)

    def evaluate(module: KVDistiller) -> tuple[dict[str, float], list[float]]:
        return evaluate_tokens(module, eval_data, held_out, layer_map)

    shuffle_seed = config.seed if config.shuffle_kv else None
    data = KVDataset(store, with_kv=config.mode != "none", shuffle_seed=shuffle_seed)
    return _Parts(distiller, tokenizer, data, batches, held_out, evaluate, pairing)


def _trainer(
    parts: _Parts, config: DistillConfig, arguments: TrainingArguments, run: RunDirectory, identity: dict[str, Any]
) -> DistillTrainer:
    trainer = DistillTrainer(
        parts.distiller,
        arguments,
        config,
        parts.data,
        parts.batches,
        lambda distiller: parts.evaluate(distiller)[0],
    )
    trainer.add_callback(MetricsFile(run.metrics))
    trainer.add_callback(SealedCheckpoints(identity))
    return trainer


def _build_aligner(
    config: DistillConfig,
    store: KVStore,
    student: PreTrainedModel,
    layer_map: tuple[int, ...],
    train: NDArray[np.int64],
) -> Aligner | None:
    """Dimensions come from the store and from one forward of the student, never from flags."""
    if config.mode == "none":
        return None
    batch = KVDataset(store, with_kv=False).__getitems__([int(train[0])])
    with torch.no_grad():
        _, kv = KVDistiller(student, None).student_forward(batch["input_ids"], batch["attention_mask"])
    set_seed(config.seed)
    aligner = Aligner(
        AlignerConfig(
            mode=config.mode,
            direction=config.direction,
            layer_map=layer_map,
            student=KVSpace(kv.shape[3], kv.shape[5]),
            teacher=KVSpace(store.geometry.num_kv_heads, store.geometry.head_dim),
            share_dim_proj=config.share_dim_proj,
            init_uniform=config.init_uniform,
        )
    )
    aligner.set_normalisation(*teacher_moments(store, train.tolist()))
    return aligner


def _arguments(
    config: DistillConfig, run: RunDirectory, device: torch.device, save_steps: int | None
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        bf16=config.bf16,
        logging_steps=10,
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="epoch" if save_steps is None else "steps",
        save_steps=save_steps or 1,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    if device.type == "cuda":
        # One process, one GPU, and the one that was asked for: TrainingArguments picks the first, and DataParallel
        # over several would cut the KV along its key/value axis.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        arguments.__dict__["_setup_devices"] = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device.index or 0)
    return arguments


def _final_metrics(
    parts: _Parts, store: KVStore, config: DistillConfig, run: RunDirectory, steps: int
) -> dict[str, float | None]:
    """Everything on the held-out split, generation included; each sample goes to `predictions.jsonl`."""
    tokens, sample_ce = parts.evaluate(parts.distiller)
    if not math.isfinite(tokens["ce"]):
        raise DivergenceError(steps)
    student = parts.distiller.student
    answers = evaluate_answers(student, parts.tokenizer, store, parts.held_out, config.max_new_tokens)
    lines = []
    for index, ce in zip(parts.held_out, sample_ce, strict=True):
        text, exact = answers.get(index, (None, None))
        line = {"id": store.records[index]["id"], "ce": ce, "generated": text, "exact": exact}
        lines.append(f"{json.dumps(line)}\n")
    write_atomic(run.predictions, "".join(lines).encode())
    exact_match = sum(exact for _, exact in answers.values()) / len(answers) if answers else None
    return {**tokens, "exact_match": exact_match}


def _save(parts: _Parts, run: RunDirectory) -> None:
    """The student as `from_pretrained` reads it, with its tokenizer, and the aligner beside it."""
    student, tokenizer, aligner = parts.distiller.student, parts.tokenizer, parts.distiller.aligner
    student.generation_config.eos_token_id = tokenizer.eos_token_id
    student.generation_config.pad_token_id = tokenizer.pad_token_id
    # A file in its place is an error of save_pretrained's log alone.
    run.student.mkdir(exist_ok=True)
    student.save_pretrained(run.student)
    tokenizer.save_pretrained(run.student)
    if aligner is not None:
        aligner.save(run.path)
