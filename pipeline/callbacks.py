"""What a training run leaves while it goes on: a progress bar, `metrics.jsonl`, checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoint import seal_checkpoint


class TrainingProgress(TrainerCallback):
    """One bar over all steps, with the latest losses."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name
        self._task: TaskID | None = None
        self._losses = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._task = self._progress.add_task(self._name, total=state.max_steps, status="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._task is not None
        step = f"step {state.global_step}/{state.max_steps}"
        self._progress.update(self._task, completed=state.global_step, status=step + self._losses)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        shown = [f"{name} {logs[name]:.3f}" for name in ("ce", "kv", "eval_ce") if name in logs]
        if shown:
            self._losses = "".join(f" · {loss}" for loss in shown)


class MetricsFile(TrainerCallback):
    """`metrics.jsonl`: one line for every log, with its step. A resumed run drops what it will log again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._path.write_text("".join(map(_line, state.log_history)))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        with self._path.open("a") as file:
            file.write(_line(state.log_history[-1]))


class SealedCheckpoints(TrainerCallback):
    """A checkpoint counts once it is sealed; only then does the one before it go.

    One at the end of an epoch, or of the run, waits for the evaluation there, which a resumed run would not repeat.
    """

    def __init__(self, run: Mapping[str, Any]) -> None:
        self._run = run
        self._waits = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert state.epoch is not None
        is_end = state.epoch.is_integer() or state.global_step >= state.max_steps
        self._waits = control.should_save and is_end
        control.should_save = control.should_save and not is_end

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save = control.should_save or self._waits

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        seal_checkpoint(folder, self._run)
        for other in folder.parent.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)


def _line(entry: Mapping[str, Any]) -> str:
    """Keys sorted, as they come back from a checkpoint."""
    return f"{json.dumps(entry, sort_keys=True)}\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a line that is still being written does not count."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
