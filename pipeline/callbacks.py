"""What a training run leaves while it goes on: a progress bar and `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgress(TrainerCallback):
    """One bar over all steps, with the latest losses."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name
        self._task: TaskID | None = None
        self._losses = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._task = self._progress.add_task(self._name, total=state.max_steps, completed=state.global_step, status="")

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


def _line(entry: Mapping[str, Any]) -> str:
    """Keys sorted, as they come back from a checkpoint."""
    return f"{json.dumps(entry, sort_keys=True)}\n"
