"""kill -9 anywhere, then the same command again: the end is what it would have been, to the last bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.run_directory import RunDirectory

from .conftest import EXTRACT, Commands, Tally, contents

KILLED = -9
DISTILL = ["distill", "--mode", "structured", "--store", "../x.zarr", "--output-dir", "run", "--batch-size", "8"]
DISTILL += ["--epochs", "2", "--save-steps", "2", "--max-new-tokens", "4"]


def faults(events: int, seconds: float, count: int, seed: int) -> list[dict[str, Any]]:
    """Three of four at an event, one at any time."""
    rng = np.random.default_rng(seed)
    return [
        {"signals": [[rng.uniform(0, seconds), signal.SIGKILL]]}
        if number % 4 == 3
        else {"kill_at_event": int(rng.integers(1, events + 1))}
        for number in range(count)
    ]


def test_an_extraction_killed_anywhere_ends_with_the_same_store(
    commands: Commands, tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    start = time.perf_counter()
    whole = tmp_path / "whole"
    whole.mkdir()
    events = commands.finish(EXTRACT, whole)["events"]
    expected = contents(whole, {"x.zarr/zarr.json"})
    attributes = KVStore.open(whole / "x.zarr").manifest
    assert KVStore.open(whole / "x.zarr").num_shards >= 8
    injected = 0
    for number, fault in enumerate(faults(events, time.perf_counter() - start, points(12, 140), seed=0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        killed = commands.run(EXTRACT, folder, **fault)["code"] == KILLED
        injected += killed
        commands.finish(EXTRACT, folder)
        assert contents(folder, {"x.zarr/zarr.json"}) == expected, fault
        assert KVStore.open(folder / "x.zarr").manifest == attributes
    assert injected > 0
    tally.add("extract killed", tried=number + 1, injected=injected, detected=injected, lost=0)


def test_a_distillation_killed_anywhere_ends_with_the_same_weights(
    commands: Commands, tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    """Checkpoints lie within an epoch: optimizer, schedule, random state and the reader's place are all resumed."""
    commands.finish(EXTRACT, tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    start = time.perf_counter()
    events = commands.finish(DISTILL, whole)["events"]
    # A run that died once it was finished is not begun again, so the marker of a dead process may stay.
    left_out = {"run/run.json", "run/metrics.jsonl", "run/checkpoints/*/*", ".run.lock"}
    expected = contents(whole, left_out)
    record = json.loads((whole / "run" / "run.json").read_text())
    injected = 0
    for number, fault in enumerate(faults(events, time.perf_counter() - start, points(4, 100), seed=1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        injected += commands.run(DISTILL, folder, **fault)["code"] == KILLED
        commands.finish(DISTILL, folder)
        assert contents(folder, left_out) == expected, fault
        again = json.loads((folder / "run" / "run.json").read_text())
        for part in ("metrics", "pairing", "steps", "parameters"):
            assert again[part] == record[part], (fault, part)
        assert curve(folder) == curve(whole), fault
    assert injected > 0
    tally.add("distill killed", tried=number + 1, injected=injected, detected=injected, lost=0)


def curve(folder: Path) -> list[dict[str, Any]]:
    """The evaluations. (The losses between are means over the steps since the start of the process.)"""
    return [line for line in RunDirectory(folder / "run").read_metrics() if "eval_ce" in line]


EXPERIMENT = """
name = "x"
primary_metric = "ce"
greater_is_better = false
seeds = [1, 2]
[extract]
model = "qwen"
samples = 40
eval_samples = 4
store = "x.zarr"
[budget]
max_steps = 6
[base]
batch_size = 8
max_new_tokens = 4
[arms.none]
mode = "none"
[arms.flat]
mode = "flat"
[[comparisons]]
arm = "flat"
control = "none"
"""


def scores(folder: Path) -> Any:
    """What an experiment found, without what it cost."""
    results = json.loads((folder / "reports" / "x" / "results.json").read_text())
    return results["comparisons"], [(run["name"], run["scores"], run["curve"]) for run in results["runs"]]


def test_an_experiment_killed_at_any_time_ends_with_the_same_results(
    tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    """The process that is killed is the one that leads; its runs see that it is gone, and end."""
    command = [sys.executable, "-m", "kvpipe.cli.app", "experiment", "run", "x.toml", "--jobs", "2"]

    def start(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        (folder / "x.toml").write_text(EXPERIMENT)
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    begun = time.perf_counter()
    assert start(tmp_path / "whole").wait() == 0
    seconds, expected = time.perf_counter() - begun, scores(tmp_path / "whole")
    rng, injected = np.random.default_rng(2), 0
    for number in range(points(1, 10)):
        folder = tmp_path / str(number)
        process = start(folder)
        time.sleep(rng.uniform(0.4, 1) * seconds)
        process.kill()
        injected += process.wait() == KILLED
        # Runs that still lived hold their folders for as long as they take to see it.
        code = 1
        for _ in range(5):
            if (code := start(folder).wait()) == 0:
                break
            time.sleep(1)
        assert code == 0
        assert scores(folder) == expected
    tally.add("experiment killed", tried=number + 1, injected=injected, detected=injected, lost=0)
