"""`metrics.jsonl`: what a log leaves there, and who may read it meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

from kvpipe.pipeline.callbacks import MetricsFile
from kvpipe.pipeline.run_directory import RunDirectory
from transformers import TrainerControl, TrainerState, TrainingArguments


def test_a_file_that_is_still_being_written_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert RunDirectory(path.parent).read_metrics() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert RunDirectory(path.parent).read_metrics() == [{"step": 1}, {"step": 2}]


def test_a_resumed_run_drops_what_it_will_log_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    arguments, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"), TrainerControl()

    def log(state: TrainerState, step: int) -> None:
        state.log_history.append({"step": step, "loss": 1 / step})
        callback.on_log(arguments, state, control)

    callback, state = MetricsFile(path), TrainerState()
    callback.on_train_begin(arguments, state, control)
    for step in (1, 2, 3):
        log(state, step)
    assert [entry["step"] for entry in RunDirectory(path.parent).read_metrics()] == [1, 2, 3]

    # The checkpoint was taken after step 2.
    resumed = TrainerState(log_history=json.loads(json.dumps(state.log_history[:2])))
    callback.on_train_begin(arguments, resumed, control)
    log(resumed, 3)
    assert [entry["step"] for entry in RunDirectory(path.parent).read_metrics()] == [1, 2, 3]
