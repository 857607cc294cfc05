"""The training loop: transformers' Trainer, fed from the store and watched for collapse."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from ..data.batching import ShuffledBatches
from ..kvcache.errors import DivergenceError
from .checkpoint import load_optimizer, load_rng, save_optimizer, save_rng
from .config import DistillConfig
from .distiller import KVDistiller
from .fused_dataset import FusedDataset
from .monitor import CollapseMonitor, gradient_share
from .read_ahead import ReadAhead
from .reading import reading
from .run_checkpoints import REMEDY
from .run_clock import RunClock
from .training_data import KVDataset

Evaluate = Callable[[KVDistiller], dict[str, float]]

WATCHED = ("target", "target_mask", "kv_loss")
"""What a step says of itself for the monitor, beside its losses."""

MIN_TOKENS = 8
"""A target of fewer is not looked at."""

SHARE_EVERY = 10
"""Logged steps between two looks at the gradients: each costs two more backward passes."""


class DistillTrainer(Trainer):
    """Trains a KVDistiller. `evaluate` runs `evaluate_fn`; checkpoints hold safetensors and JSON only. `clock` tells
    what training, evaluations and waiting for batches took."""

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        distiller: KVDistiller,
        arguments: TrainingArguments,
        config: DistillConfig,
        dataset: KVDataset | FusedDataset,
        batches: ShuffledBatches,
        evaluate_fn: Evaluate,
        clock: RunClock,
    ) -> None:
        super().__init__(model=distiller, args=arguments, train_dataset=dataset, eval_dataset=dataset)
        self.config = config
        self.monitor = CollapseMonitor()
        self.clock = clock
        self._batches = batches
        self._ahead: ReadAhead[Any] | None = None
        self._evaluate_fn = evaluate_fn
        self._part_sums: dict[str, Tensor] = {}
        self._part_steps = 0
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=_as_is,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        if self._ahead is None or self._ahead.source is not epoch_iterator:
            # Threads that wait for each other cost most where all cores compute: there a reader is better off alone.
            self._ahead = ReadAhead(epoch_iterator, single_core=self.args.device.type == "cpu")
        before = self._ahead.waited
        batches = super().get_batch_samples(iter(self._ahead), num_batches, device)
        self.clock.waited(self._ahead.waited - before)
        return batches

    # ------------------------------------------------------------------ optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with aligners and router at their own learning rate; no weight decay on biases and norms."""
        if self.optimizer is None:
            distiller = model if model is not None else self.model
            decayed = set(self.get_decay_parameter_names(distiller))
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, parameter in distiller.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((".student." not in f".{name}", name in decayed), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, distiller)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.config.aligner_lr if is_aligner else self.config.learning_rate,
                        "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                    }
                    for (is_aligner, is_decayed), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        distiller = self.accelerator.unwrap_model(model)
        distiller.progress = self.state.global_step / max(1, self.state.max_steps)
        outputs = model(**inputs)
        watched = {name: outputs.pop(name) for name in WATCHED if name in outputs}
        loss = outputs.pop("loss")
        for part, value in outputs.items():
            self._part_sums[part] = value + self._part_sums.get(part, 0)
        self._part_steps += 1
        if watched and self._looks_at_target(distiller, watched["target_mask"]):
            self._check_collapse(watched["target"], watched["target_mask"])
        if watched and self._looks_at_gradients(distiller):
            self.monitor.gradient_share = gradient_share(distiller.student, watched["kv_loss"], loss)
        return loss

    def _looks_at_target(self, distiller: KVDistiller, mask: Tensor) -> bool:
        """Now and then, where training can move it at all. A few tokens have no variance to speak of."""
        due = self.state.global_step % self.args.logging_steps == 0
        return distiller.target_moves and due and int(mask.sum()) >= MIN_TOKENS

    def _looks_at_gradients(self, distiller: KVDistiller) -> bool:
        """Now and then, where there is an aligner to absorb anything, and once all of the loss is there."""
        due = self.state.global_step % (SHARE_EVERY * self.args.logging_steps) == 0
        warm = all(distiller.progress >= term.warmup for term in distiller.terms)
        return due and warm and distiller.projects and distiller.kv_weight > 0

    def _check_collapse(self, target: Tensor, mask: Tensor) -> None:
        self.monitor.update(target, mask)
        if self.monitor.collapsed and self.config.on_collapse == "stop":
            raise self.monitor.error()

    # ------------------------------------------------------------------ logs and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer does, with the parts of the loss. Its own summary at the end is left out: of a resumed run it
        knows the last process alone, and `run.json` says all of it."""
        if "train_runtime" in logs:
            return
        if not all(math.isfinite(logs[name]) for name in ("loss", "eval_ce") if name in logs):
            raise DivergenceError(self.state.global_step)
        if "loss" in logs and self._part_steps:
            logs |= {part: float(total) / self._part_steps for part, total in self._part_sums.items()}
            self._part_sums, self._part_steps = {}, 0
            if self.monitor.latest is not None:
                logs["target_variance"] = self.monitor.latest.variance
                logs["target_effective_rank"] = self.monitor.latest.effective_rank
            if self.monitor.gradient_share is not None:
                logs["kv_gradient_share"] = self.monitor.gradient_share
        super().log(logs, start_time)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        self.clock.lap("train")
        distiller = self.accelerator.unwrap_model(self.model)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self._evaluate_fn(distiller).items()}
        self.clock.lap("evaluation")
        self.log(dict(metrics))
        # Trainer would ask again where an epoch ends with this step.
        self.control.should_evaluate = False
        return metrics

    # ------------------------------------------------------------------ checkpoints

    def run(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint on if there is one. One of the last step is taken as it is: within an epoch Trainer
        would take one step more."""
        if checkpoint is None:
            self.train()
            return
        with reading(checkpoint, REMEDY):
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            ended = state.global_step >= state.max_steps
        if not ended:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        self.callback_handler.on_train_begin(self.args, self.state, self.control)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        # What a process that was killed left of the same checkpoint.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_model(self.model, str(folder / "model.safetensors"))
        self.monitor.save(folder)
        self.clock.lap("train")
        self.clock.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading(Path(resume_from_checkpoint), REMEDY):
            load_model(model or self.model, str(Path(resume_from_checkpoint) / "model.safetensors"))
            self.monitor.load(Path(resume_from_checkpoint))
            self.clock.load(Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            save_optimizer(self.optimizer, self.lr_scheduler, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading(Path(checkpoint), REMEDY):
                load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Losses are never scaled (bfloat16 needs no scaling), and a scaler's state would be a pickle."""

    def _save_rng_state(self, output_dir: str) -> None:
        save_rng(Path(output_dir) / f"rng_state_{self.args.process_index}.json")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading(Path(checkpoint), REMEDY):
                load_rng(Path(checkpoint) / f"rng_state_{self.args.process_index}.json")


def _as_is(batch: Any) -> Any:
    return batch
