"""Killed or interrupted in the middle, then the same command again: the end is the same to the last bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

EXTRACT = ["--samples", 120, "--eval-samples", 4, "--batch-size", 4, "--max-shard-size", "1KB", "--store", "many.zarr"]
SHARDS = 128


def _stop_when(process: subprocess.Popen[str], reached: Callable[[], bool], sent: signal.Signals) -> tuple[int, str]:
    """Send a signal as soon as something is reached; exit code and standard error."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, f"it ended too early:\n{process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr


def _ledger(store: Path) -> int:
    return sum(1 for _ in store.glob("ledger/c/*/0"))


def _partials(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_an_extraction_killed_and_then_interrupted_ends_with_the_same_bytes(
    kvpipe: Any, built_once: Any, teacher: Path, tmp_path: Path
) -> None:
    """One store: SIGKILL, the command again and Ctrl-C, the command a third time."""
    command = ["extract", "--model", teacher, "--queries", *EXTRACT]
    whole = built_once("uninterrupted", lambda folder: kvpipe(*command, cwd=folder)) / "many.zarr"
    assert _ledger(whole) == SHARDS

    store = tmp_path / "many.zarr"
    code, _ = _stop_when(kvpipe.start(*command, cwd=tmp_path), lambda: _ledger(store) >= 12, signal.SIGKILL)
    assert code == -signal.SIGKILL
    killed = _ledger(store)
    assert 12 <= killed < SHARDS
    # What a process leaves that is killed while zarr writes the group's attributes.
    orphan = store / "zarr.0123456789abcdef0123456789abcdef.partial"
    orphan.write_bytes(b"{")

    code, stderr = _stop_when(
        kvpipe.start(*command, cwd=tmp_path), lambda: _ledger(store) >= killed + 12, signal.SIGINT
    )
    assert code == 130, stderr
    assert "Traceback" not in stderr
    assert killed + 12 <= _ledger(store) < SHARDS
    assert _partials(tmp_path) == []
    spent = zarr.open(store, mode="r").attrs["kvpipe"]["extraction"]["tokens"]
    assert spent > 0, "an interrupted extraction has cost the teacher's time as well"

    outcome = kvpipe(*command, cwd=tmp_path)
    assert "128 samples" in outcome.stdout
    assert _partials(tmp_path) == []
    parts = ("kv", "queries", "ledger", "input_ids", "segment_ids", "spans", "length", "split", "text", "tokenizer")
    for part in parts:
        assert _bytes(store / part) == _bytes(whole / part), part
    arrays = zarr.open(whole, mode="r"), zarr.open(store, mode="r")
    for name in ("kv", "queries", "ledger", "input_ids"):
        assert (arrays[0][name][...] == arrays[1][name][...]).all()
    manifests = [group.attrs["kvpipe"]["manifest"] for group in arrays]
    assert manifests[0] == manifests[1]
    tokens = [group.attrs["kvpipe"]["extraction"]["tokens"] for group in arrays]
    assert tokens[1] > spent
    assert tokens[0] == int(arrays[0]["length"][...].sum())


def test_a_distillation_killed_after_a_checkpoint_ends_with_the_same_weights(
    kvpipe: Any, run_of: Callable[[str], Path], store: Path, tmp_path: Path
) -> None:
    whole, run = run_of("structured"), tmp_path / "run"
    config = json.loads((whole / "run.json").read_text())["config"]
    command = ["distill", "--mode", "structured", "--store", store, "--output-dir", run]
    command += ["--batch-size", config["batch_size"], "--epochs", config["epochs"], "--max-new-tokens", 8]

    def checkpointed() -> bool:
        return any(run.glob("checkpoints/checkpoint-*/checkpoint.json"))

    code, _ = _stop_when(kvpipe.start(*command, cwd=tmp_path), checkpointed, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (run / "run.json").exists()
    # What a process leaves that is killed in the middle of a checkpoint.
    last = max(int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/*/checkpoint.json"))
    earlier = json.loads((run / "checkpoints" / f"checkpoint-{last}" / "seconds.json").read_text())
    torn = run / "checkpoints" / f"checkpoint-{last + 6}"
    shutil.copytree(run / "checkpoints" / f"checkpoint-{last}", torn, dirs_exist_ok=True)
    (torn / "checkpoint.json").unlink()

    start = time.perf_counter()
    outcome = kvpipe(*command, cwd=tmp_path)
    second = time.perf_counter() - start
    assert "30 steps" in outcome.stdout
    record = json.loads((run / "run.json").read_text())
    assert record["resumed_from"] == f"checkpoint-{last}"
    for part, spent in earlier.items():
        assert spent <= record["seconds"][part] < spent + second, "its costs are those of both processes, once"
    for file in ("student/model.safetensors", "aligner.safetensors", "predictions.jsonl"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    expected = json.loads((whole / "run.json").read_text())
    for part in ("metrics", "pairing", "steps", "tokens", "collapsed", "parameters"):
        assert record[part] == expected[part], part
    assert _curve(run) == _curve(whole)


@pytest.mark.parametrize("options", [[], ["--save-steps", 6]], ids=["epochs", "6"])
def test_a_run_killed_between_its_last_checkpoint_and_its_end_takes_no_step_more(
    kvpipe: Any, store: Path, tmp_path: Path, options: list[object]
) -> None:
    """Epochs have three steps: the seventh lies within one, the sixth ends one."""
    run = tmp_path / "run"
    command = ["distill", "--mode", "flat", "--store", store, "--output-dir", run, "--batch-size", 8]
    command += ["--max-steps", 7, "--max-new-tokens", 4, *options]
    kvpipe(*command, cwd=tmp_path)
    whole = {name: (run / name).read_bytes() for name in ("student/model.safetensors", "predictions.jsonl")}
    curve, record = _curve(run), json.loads((run / "run.json").read_text())
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-7"]
    assert [line["step"] for line in curve] == [1, 2, 3, 4, 5, 6, 7]

    def again(resumed_from: str | None) -> None:
        (run / "run.json").unlink()
        shutil.rmtree(run / "student")
        assert "7 steps" in kvpipe(*command, cwd=tmp_path).stdout
        assert {name: (run / name).read_bytes() for name in whole} == whole
        assert _curve(run) == curve
        repeated = json.loads((run / "run.json").read_text())
        assert repeated["resumed_from"] == resumed_from
        assert all(repeated[part] == record[part] for part in ("metrics", "steps", "tokens"))

    again("checkpoint-7")
    # What a process leaves that is killed while it seals: the next one writes the same checkpoint.
    (run / "checkpoints" / "checkpoint-7" / "checkpoint.json").rename(
        run / "checkpoints" / "checkpoint-7" / "checkpoint.json.partial"
    )
    again(None)
    again("checkpoint-7")


def _curve(run: Path) -> list[dict[str, Any]]:
    """The held-out metrics by step. (The losses between are means over the steps since the start of the process.)"""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "eval_ce" in line]
