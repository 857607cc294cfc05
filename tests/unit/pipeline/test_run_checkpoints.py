"""Which checkpoint a run goes on from, and which it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvpipe.kvcache.errors import ConfigError
from kvpipe.pipeline.run_checkpoints import SealedCheckpoints, last_checkpoint, seal_checkpoint
from transformers import TrainerControl, TrainerState, TrainingArguments

RUN: dict[str, Any] = {"config": {"seed": 0}, "stores": ["f00"]}


def make(folder: Path, step: object, *, sealed: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 7}')
    if sealed:
        seal_checkpoint(checkpoint, RUN)
    return checkpoint


def test_the_last_sealed_checkpoint_is_the_one_to_go_on_from(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path, RUN) is None
    make(tmp_path, 250, sealed=False)
    assert last_checkpoint(tmp_path, RUN) is None
    make(tmp_path, 9)
    for name in ("final", "1x", "٣٠٠", "9" * 40):
        make(tmp_path, name)
    whole = make(tmp_path, 100)
    assert last_checkpoint(tmp_path, RUN) == whole


def test_every_damage_is_seen(tmp_path: Path) -> None:
    checkpoint, rng = make(tmp_path, 7), np.random.default_rng(0)
    for file in sorted(checkpoint.iterdir()):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[int(rng.integers(len(whole)))] ^= 1
        # Without its seal it is none.
        lost = [] if file.name == "checkpoint.json" else [None]
        for damaged in (bytes(flipped), whole[:-1], whole + b"x", b"", b"[]", b"null", *lost):
            file.unlink(missing_ok=True)
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(ConfigError, match=r"checkpoint-7 is damaged: expected what kvpipe wrote, found"):
                last_checkpoint(tmp_path, RUN)
        file.write_bytes(whole)
    assert last_checkpoint(tmp_path, RUN) == checkpoint


def test_another_runs_or_steps_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 7)
    with pytest.raises(ConfigError, match=r"another run or step \(run\.config\.seed differs\): expected 1, found 0"):
        last_checkpoint(tmp_path, {**RUN, "config": {"seed": 1}})
    checkpoint.rename(tmp_path / "checkpoint-70")
    with pytest.raises(ConfigError, match=r"\(name differs\): expected checkpoint-70, found checkpoint-7"):
        last_checkpoint(tmp_path, RUN)


def test_the_others_go_once_one_is_sealed_and_nothing_else_does(tmp_path: Path) -> None:
    for step in (2, 9):
        make(tmp_path, step)
    make(tmp_path, 4, sealed=False)
    kept = [make(tmp_path, name) for name in ("2-mine", "best")]
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    SealedCheckpoints(RUN).on_save(arguments, TrainerState(global_step=4), TrainerControl())
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "checkpoint-4", *kept])
    assert last_checkpoint(tmp_path, RUN) == tmp_path / "checkpoint-4"


@pytest.mark.parametrize(
    ("epoch", "step", "waits"), [(0.5, 3, False), (1.0, 6, True), (1.5, 20, True)], ids=["within", "epoch", "run"]
)
def test_a_checkpoint_at_an_end_waits_for_the_evaluation(tmp_path: Path, epoch: float, step: int, waits: bool) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state, control = TrainerState(epoch=epoch, global_step=step, max_steps=20), TrainerControl(should_save=True)
    callback = SealedCheckpoints(RUN)
    callback.on_step_end(arguments, state, control)
    assert control.should_save is not waits
    control.should_save = False
    callback.on_epoch_end(arguments, state, control)
    assert control.should_save is waits


def test_a_resumed_run_saves_as_often_as_it_is_told_now(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), save_steps=50, use_cpu=True, report_to="none")
    state = TrainerState(save_steps=1)
    SealedCheckpoints(RUN).on_train_begin(arguments, state, TrainerControl())
    assert state.save_steps == 50
