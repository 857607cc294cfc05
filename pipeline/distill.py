"""Stage two: a student learns from the store. The teacher is never loaded."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Sequence
from importlib.metadata import version
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
from ..kvcache.errors import ConfigError, StoreError
from ..kvcache.files import write_atomic
from ..kvcache.manifest import hash_json, hash_tokenizer, hash_weights
from ..kvcache.store import KVStore
from .callbacks import MetricsFile, TrainingProgress
from .config import DistillConfig
from .distiller import KVDistiller
from .evaluate import evaluate_answers, evaluate_tokens
from .models import load_student, load_tokenizer, resolve_device, starts_random, teacher_forwards, tokenizer_from_files
from .progress import progress_bar
from .run_directory import RunDirectory, run_identity
from .trainer import DistillTrainer
from .training_data import KVDataset, teacher_moments


def find_store(store: Path | None) -> Path:
    """The store to read: the one named, or the only one under `stores/`."""
    if store is not None:
        return store
    found = sorted(Path("stores").glob("*.zarr"))
    if len(found) != 1:
        raise StoreError(
            "which store?",
            expected="one store under stores/",
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one student and return its run record, also written to `run_dir`.

    A finished run is returned as it is; an interrupted one goes on from its last checkpoint. Raises
    ConfigError, ModelError or StoreError for what the user can mend, CollapseError for a collapsed target.
    """
    start = time.perf_counter()
    resolved = resolve_device(device)
    store = KVStore.open(store_path)
    store.require_complete()
    run = RunDirectory(run_dir)
    run.claim(run_identity(config, store), overwrite=overwrite)
    if (record := run.record) is not None:
        return record
    tokenizer = tokenizer_from_files(store.tokenizer_files())
    student = load_student(config.student, vocab_size=len(tokenizer), random_init=config.random_init, seed=config.seed)
    _check_tokenizer(config, student, len(tokenizer), store)
    train, held_out = _indices(store, config), store.indices(config.eval_split)
    pairing = _pairing(store, student, train, held_out, config)
    layer_map = ratio_map(student.config.get_text_config(decoder=True).num_hidden_layers, store.geometry.num_layers)
    distiller = KVDistiller(student, _build_aligner(config, store, student, layer_map, train), config.kv_weight)
    eval_data = KVDataset(store, with_kv=True)
    trainer = DistillTrainer(
        distiller,
        _arguments(config, run, resolved),
        config,
        KVDataset(
            store,
            with_kv=config.mode != "none",
            shuffle_seed=config.seed if config.shuffle_kv else None,
        ),
        _batches(store, train, config),
        lambda module: evaluate_tokens(module, eval_data, held_out.tolist(), layer_map)[0],
    )
    trainer.add_callback(MetricsFile(run.metrics))
    setup_seconds = time.perf_counter() - start
    with progress or progress_bar() as bar:
        trainer.add_callback(TrainingProgress(bar, run_dir.name))
        checkpoint = run.last_checkpoint()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    train_seconds = time.perf_counter() - start - setup_seconds
    metrics = _final_metrics(distiller, tokenizer, eval_data, held_out.tolist(), layer_map, config, run)
    _save(distiller, tokenizer, run)
    total = time.perf_counter() - start
    record = {
        "name": run_dir.name,
        "config": config.to_dict(),
        "store": {"path": str(store_path), "manifest": store.manifest.hash},
        "steps": trainer.state.global_step,
        "resumed_from": checkpoint.name if checkpoint else None,
        "tokens_per_epoch": int(store.length[train].sum()),
        "parameters": _parameter_counts(distiller),
        "metrics": metrics,
        "collapsed": trainer.monitor.collapsed,
        "seconds": {
            "setup": setup_seconds,
            "train": train_seconds - trainer.eval_seconds,
            "data_wait": trainer.data_wait_seconds,
            "evaluation": trainer.eval_seconds + total - setup_seconds - train_seconds,
            "total": total,
        },
        "data_wait_share": trainer.data_wait_seconds / max(train_seconds - trainer.eval_seconds, 1e-9),
        "peak_memory_bytes": _peak_memory(resolved),
        "teacher_forwards": teacher_forwards(),
        "pairing": pairing,
        "device": str(resolved),
        "versions": {name: version(name) for name in ("kvpipe", "torch", "transformers", "zarr", "numpy")}
        | {"python": platform.python_version()},
    }
    run.finish(record)
    return record


def _indices(store: KVStore, config: DistillConfig) -> NDArray[np.int64]:
    train = store.indices("train")
    if config.samples is not None and config.samples > len(train):
        raise ConfigError(
            "the store has fewer training samples",
            expected=f"at most {len(train)}",
            found=config.samples,
            remedy="Lower --samples, or extract more",
        )
    return train[: config.samples]


def _check_tokenizer(config: DistillConfig, student: PreTrainedModel, num_tokens: int, store: KVStore) -> None:
    """A student must read the very tokens that the teacher read. One that starts at random learns them anew."""
    if starts_random(config.student, config.random_init):
        return
    remedy = "Choose a student with the teacher's tokenizer, or start it afresh with --random-init"
    own = hash_tokenizer(load_tokenizer(config.student, option="--student"))
    if own != store.manifest.tokenizer_hash:
        raise StoreError(
            f"{store.path} was extracted with another tokenizer than the student's",
            expected=own[:16],
            found=store.manifest.tokenizer_hash[:16],
            remedy=remedy,
        )
    if (vocabulary := student.get_input_embeddings().num_embeddings) < num_tokens:
        raise StoreError(
            "the student's vocabulary is too small", expected=f"at least {num_tokens}", found=vocabulary, remedy=remedy
        )


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


def _arguments(config: DistillConfig, run: RunDirectory, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
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
        save_strategy="epoch",
        save_total_limit=1,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


def _batches(store: KVStore, train: NDArray[np.int64], config: DistillConfig) -> ShuffledBatches:
    return ShuffledBatches(train, store.length, config.batch_size, config.seed, store.layout.samples)


def _pairing(
    store: KVStore,
    student: PreTrainedModel,
    train: NDArray[np.int64],
    held_out: NDArray[np.int64],
    config: DistillConfig,
) -> dict[str, str]:
    """What two runs must share to be compared as a pair: hashes of the initial student, of the data order and
    of the evaluation samples."""
    return {
        "student_init": hash_weights(student.state_dict().items())[:16],
        "data_order": hash_json(list(_batches(store, train, config)))[:16],
        "eval_samples": hash_json(held_out.tolist())[:16],
    }


def _final_metrics(
    distiller: KVDistiller,
    tokenizer: PreTrainedTokenizerBase,
    dataset: KVDataset,
    held_out: Sequence[int],
    layer_map: Sequence[int],
    config: DistillConfig,
    run: RunDirectory,
) -> dict[str, float | None]:
    """Everything on the held-out split, generation included; each sample goes to `predictions.jsonl`."""
    tokens, sample_ce = evaluate_tokens(distiller, dataset, held_out, layer_map)
    answers = evaluate_answers(distiller.student, tokenizer, dataset.store, held_out, config.max_new_tokens)
    lines = []
    for index, ce in zip(held_out, sample_ce, strict=True):
        text, exact = answers.get(index, (None, None))
        line = {"id": dataset.store.records[index]["id"], "ce": ce, "generated": text, "exact": exact}
        lines.append(json.dumps(line))
    write_atomic(run.path / "predictions.jsonl", ("\n".join(lines) + "\n").encode())
    exact_match = sum(exact for _, exact in answers.values()) / len(answers) if answers else None
    return {**tokens, "exact_match": exact_match}


def _save(distiller: KVDistiller, tokenizer: PreTrainedTokenizerBase, run: RunDirectory) -> None:
    student = distiller.student
    student.generation_config.eos_token_id = tokenizer.eos_token_id
    student.generation_config.pad_token_id = tokenizer.pad_token_id
    student.save_pretrained(run.student)
    tokenizer.save_pretrained(run.student)
    if distiller.aligner is not None:
        distiller.aligner.save(run.path)


def _parameter_counts(distiller: KVDistiller) -> dict[str, int]:
    def count(module: torch.nn.Module | None) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad) if module is not None else 0

    return {"student": count(distiller.student), "aligner": count(distiller.aligner)}


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where one is used, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
