"""Run directories of a stranger: refused in one line or read as they are, never obeyed.

Every checkpoint is forged twice: as a clumsy hand leaves it, and sealed anew.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kvpipe.pipeline.run_checkpoints import seal_checkpoint
from safetensors.torch import load_file, save_file

from .conftest import HOSTILE_DISTILL, Tally
from .hostile_reader import Marking, Reader, is_one_line


def _plant_pickles(run: Path) -> None:
    (checkpoint,) = run.glob("checkpoints/checkpoint-*")
    names = ["optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin"]
    for name in [*names, "pytorch_model.bin", "adapter_model.bin"]:
        (checkpoint / name).write_bytes(pickle.dumps(Marking(run.parent / "marker")))


def _only_a_pickle(run: Path) -> None:
    _plant_pickles(run)
    (weights,) = run.glob("checkpoints/checkpoint-*/model.safetensors")
    weights.unlink()


def _overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        (file,) = run.glob(name)
        file.write_bytes(content)

    return change


def _foreign_checkpoint(run: Path) -> None:
    folder = run / "checkpoints" / "checkpoint-final"
    folder.mkdir()
    (folder / "checkpoint.json").write_text("{}")


def _edit(name: str, **changes: Any) -> Callable[[Path], object]:
    """Change some values in a JSON file of the checkpoint."""

    def change(run: Path) -> None:
        (file,) = run.glob(f"checkpoints/*/{name}")
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _without_a_tensor(name: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        (file,) = run.glob(f"checkpoints/*/{name}")
        tensors = load_file(file)
        del tensors[min(tensors)]
        save_file(tensors, file)

    return change


def _renamed(run: Path) -> None:
    (folder,) = run.glob("checkpoints/checkpoint-*")
    folder.rename(folder.with_name("checkpoint-999"))


DEEP = b"[" * 100_000
RUNS: dict[str, Callable[[Path], object]] = {
    "pickles beside the checkpoint": _plant_pickles,
    "pickled weights only": _only_a_pickle,
    "checkpoint without a number": _foreign_checkpoint,
    "state is a list": _overwrite("checkpoints/*/trainer_state.json", b"[]"),
    "state is deep": _overwrite("checkpoints/*/trainer_state.json", DEEP),
    "state is not UTF-8": _overwrite("checkpoints/*/trainer_state.json", b"\xff\xfe"),
    "optimizer is empty": _overwrite("checkpoints/*/optimizer.json", b"{}"),
    "optimizer is not JSON": _overwrite("checkpoints/*/optimizer.json", b"\xff"),
    "optimizer is not safetensors": _overwrite("checkpoints/*/optimizer.safetensors", b"\xff" * 64),
    "optimizer of words": _edit("optimizer.json", param_groups="all", scheduler="x"),
    "optimizer of no groups": _edit("optimizer.json", param_groups=[]),
    "schedule of other attributes": _edit("optimizer.json", scheduler={"step": None, "last_epoch": "x"}),
    "weights are not safetensors": _overwrite("checkpoints/*/model.safetensors", b"\xff" * 64),
    "weights lack a tensor": _without_a_tensor("model.safetensors"),
    "state is empty": _overwrite("checkpoints/*/trainer_state.json", b"{}"),
    "state of another step": _edit("trainer_state.json", global_step=1),
    "state of more steps": _edit("trainer_state.json", max_steps=10**9),
    "state of a word of steps": _edit("trainer_state.json", max_steps="many"),
    "state of other names": _edit("trainer_state.json", other=1),
    "state of other callbacks": _edit("trainer_state.json", stateful_callbacks={"TrainerControl": {"args": {"x": 1}}}),
    "monitor of words": _overwrite("checkpoints/*/monitor.json", b'["a", "b"]'),
    "seconds of words": _overwrite("checkpoints/*/seconds.json", b'["a", "b"]'),
    "random state of words": _overwrite("checkpoints/*/rng_state_0.json", b'{"python": 1}'),
    "checkpoint of another step": _renamed,
    "config is deep": _overwrite("config.json", DEEP),
    "config is not UTF-8": _overwrite("config.json", b"\xff"),
    "record is a list": lambda run: (run / "run.json").write_bytes(b"[]"),
    "record is empty": lambda run: (run / "run.json").write_bytes(b"{}"),
    "record is deep": lambda run: (run / "run.json").write_bytes(DEEP),
    "record is not UTF-8": lambda run: (run / "run.json").write_bytes(b"\xff"),
}


@pytest.fixture(scope="module")
def interrupted(reader: Reader, sound_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and a run that has a checkpoint, and a step to go."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(sound_store, folder / "x.zarr")
    answer = reader.command(*HOSTILE_DISTILL, "--max-steps", 1, cwd=folder)
    assert answer["code"] == 0, answer["output"]
    run = folder / "run"
    (run / "run.json").unlink()
    identity = json.loads((run / "config.json").read_text())
    identity["config"]["max_steps"] = 2
    (run / "config.json").write_text(json.dumps(identity))
    _edit("trainer_state.json", max_steps=2)(run)
    seal_checkpoint(run / "checkpoints" / "checkpoint-1", identity)
    return folder


def go_on(reader: Reader, folder: Path) -> dict[str, Any]:
    return reader.command(*HOSTILE_DISTILL, "--max-steps", 2, cwd=folder)


@pytest.mark.parametrize("resealed", [False, True], ids=["", "resealed"])
def test_a_forged_run_is_refused_or_harmless(
    reader: Reader, interrupted: Path, tmp_path: Path, tally: Tally, forged_run: str, resealed: bool
) -> None:
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    RUNS[forged_run](tmp_path / "run")
    for seal_file in tmp_path.glob("run/checkpoints/*/checkpoint.json"):
        if resealed:
            seal_checkpoint(seal_file.parent, json.loads((interrupted / "run" / "config.json").read_text()))
    answer = go_on(reader, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"x.zarr", "run"}
    assert is_one_line(answer), f"distill ended with {answer['code']}: {answer['output'][-600:]}"
    tally.add("forged run directory", tried=1, injected=1, detected=int(answer["code"] == 2))


def test_a_run_goes_on_and_a_huge_file_in_its_checkpoint_is_not_read(
    reader: Reader, interrupted: Path, tmp_path: Path
) -> None:
    for name in ("sound", "forged"):
        shutil.copytree(interrupted, tmp_path / name)
    os.truncate(tmp_path / "forged" / "run" / "checkpoints" / "checkpoint-1" / "model.safetensors", 2**40)
    assert "2 steps" in go_on(reader, tmp_path / "sound")["output"]
    answer = go_on(reader, tmp_path / "forged")
    assert is_one_line(answer)
    assert "model.safetensors has 1099511627776 bytes instead of" in answer["output"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All forgeries in a full run, a few in a quick one."""
    step = 1 if metafunc.config.getoption("--faults") == "full" else 4
    if "forged_run" in metafunc.fixturenames:
        metafunc.parametrize("forged_run", list(RUNS)[::step])
