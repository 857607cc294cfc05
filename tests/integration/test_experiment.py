"""`kvpipe experiment`: two arms by two seeds, then again with an arm that cannot run; a tracker; a broken split."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.run_log import failure
from kvpipe.pipeline.run_process import RunProcess
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXPERIMENT = """
name = "tiny"
primary_metric = "ce"
greater_is_better = false
seeds = [1, 2]

[extract]
model = "{teacher}"
store = "stores/tiny.zarr"
samples = 24
eval_samples = 4

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
GREEDY_ARM = """
[arms.greedy]
samples = 1000

[[comparisons]]
arm = "greedy"
control = "none"
"""
RUNS = ["none-seed1", "flat-seed1", "none-seed2", "flat-seed2"]


def test_an_experiment_is_run_once_and_survives_an_arm_that_fails(kvpipe: Any, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(EXPERIMENT.format(teacher=teacher))
    (tmp_path / "greedy.toml").write_text(EXPERIMENT.format(teacher=teacher) + GREEDY_ARM)

    first = kvpipe("experiment", "run", "tiny.toml", "--jobs", 2, cwd=tmp_path)
    assert "flat against none: no verdict" in first.stdout
    assert "2 paired seeds" in first.stdout
    records = {name: tmp_path / "runs" / "tiny" / name / "run.json" for name in RUNS}
    written = {name: path.stat().st_mtime_ns for name, path in records.items()}
    _check_report(tmp_path / "reports" / "tiny")

    # One is to be run again, and its metrics are damaged until it begins.
    unfinished = records.pop("flat-seed2")
    unfinished.unlink()
    del written["flat-seed2"]
    unfinished.with_name("metrics.jsonl").write_text("garbage\n")
    kvpipe("experiment", "run", "tiny.toml", cwd=tmp_path)

    again, greedy, reported, other, status, greedy_status, differ, later = kvpipe.many(
        [
            ["experiment", "run", "tiny.toml", "--jobs", 2],
            ["experiment", "run", "greedy.toml", "--jobs", 2, "--report-dir", "reports/greedy"],
            ["experiment", "report", "tiny.toml", "--report-dir", "reports/again"],
            ["experiment", "report", "tiny.toml", "--set", "base.kv_weight=2.0"],
            ["experiment", "status", "tiny.toml"],
            ["experiment", "status", "greedy.toml"],
            ["report", "diff", "reports/tiny", "reports/greedy"],
            ["experiment", "run", "tiny.toml", "--set", "seeds=[3]", "--report-dir", "reports/later"],
        ],
        cwd=tmp_path,
    )
    assert again.code == reported.code == status.code == greedy_status.code == differ.code == 0
    assert again.stdout == first.stdout
    assert reported.stdout == first.stdout.replace("reports/tiny", "reports/again")
    assert other.code == 2
    assert "none-seed1 holds another run (config.kv_weight differs)" in other.stderr
    _check_report(tmp_path / "reports" / "again")
    for name in ("results.json", "report.html", "report.md"):
        written_again = (tmp_path / "reports" / "again" / name).read_bytes()
        assert written_again == (tmp_path / "reports" / "tiny" / name).read_bytes(), "the same but for times"
    assert status.stdout.splitlines()[0].split(maxsplit=2)[1:] == ["finished", "1 of 1 shards"]
    assert status.stdout.splitlines()[-1] == "4 runs: 4 finished"
    assert greedy_status.stdout.splitlines()[-1] == "6 runs: 4 finished, 2 failed"
    assert "expected at most 24, found 1000" in greedy_status.stdout
    assert "arm greedy" in differ.stdout
    assert "failed greedy-seed1" in differ.stdout
    assert later.code == 0
    later_results = json.loads((tmp_path / "reports" / "later" / "results.json").read_text())
    # A grid of its own is still not the one that was declared.
    assert later_results["changed"] == ["seeds (was [1, 2])"]
    assert greedy.code == 1
    assert {name: path.stat().st_mtime_ns for name, path in records.items()} == written, "no run was repeated"
    for seed in (1, 2):
        (line,) = [line for line in greedy.error_lines if line.startswith(f"greedy-seed{seed} failed: ")]
        assert "expected at most 24, found 1000" in line
        assert line.endswith(f"(see runs/tiny/greedy-seed{seed}.log)")
        assert "the store has fewer training samples" in (tmp_path / f"runs/tiny/greedy-seed{seed}.log").read_text()
    assert "Traceback" not in greedy.stderr
    results = json.loads((tmp_path / "reports" / "greedy" / "results.json").read_text())
    assert sorted(run["name"] for run in results["runs"]) == sorted(RUNS)
    assert set(results["failures"]) == {"greedy-seed1", "greedy-seed2"}
    assert results["changed"] == ["comparisons", "arms (greedy)"]
    assert "greedy-seed1" in (tmp_path / "reports" / "greedy" / "report.md").read_text()
    by_arm = {comparison["arm"]: comparison for comparison in results["comparisons"]["ce"]}
    assert by_arm["greedy"]["verdict"] is None
    assert by_arm["greedy"]["seeds"] == []
    assert by_arm["flat"]["seeds"] == [1, 2]


def _check_report(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(), parse_constant=_no_constants)
    assert results["failures"] == {}
    assert results["changed"] == results["unrun"] == []
    assert [run["name"] for run in results["runs"]] == RUNS
    scores = {(run["arm"], run["seed"]): run["scores"]["ce"] for run in results["runs"]}
    pairings = {(run["arm"], run["seed"]): run["record"]["pairing"] for run in results["runs"]}
    for seed in (1, 2):
        assert pairings["flat", seed] == pairings["none", seed]
    assert pairings["flat", 1] != pairings["flat", 2]
    assert all(run["record"]["teacher_forwards"] == 0 for run in results["runs"])
    assert all([step for step, _ in run["curve"]] == [1, 2, 3, 4, 5, 6] for run in results["runs"])
    assert all(run["record"]["steps"] == 6 for run in results["runs"])
    assert len({run["record"]["tokens"] for run in results["runs"] if run["seed"] == 1}) == 1
    (comparison,) = results["comparisons"]["ce"]
    expected = [scores["flat", seed] - scores["none", seed] for seed in (1, 2)]
    assert comparison["seeds"] == [1, 2]
    assert comparison["differences"] == expected
    assert comparison["mean_difference"] == sum(expected) / 2
    assert 0 <= comparison["p_value"] <= 1
    assert comparison["p_adjusted"] >= comparison["p_value"]
    assert comparison["ci_low"] < comparison["mean_difference"] < comparison["ci_high"]
    savings = results["savings"]
    assert savings["runs"] == 2
    assert savings["teacher_seconds"] > 0
    assert savings["offline_seconds"] < savings["online_seconds"]
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for page in (html, markdown):
        assert "flat against none" in page
        assert "no verdict" in page
    assert html.count("<svg") == 3
    assert len(list(folder.glob("*.svg"))) == 3


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def test_a_tracker_gets_what_a_run_logs_and_one_that_is_not_there_is_refused(
    kvpipe: Any, teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(EXPERIMENT.format(teacher=teacher).replace("seeds = [1, 2]", "seeds = [1]"))
    refused = kvpipe("experiment", "run", "tiny.toml", "--report-to", "paper", cwd=tmp_path, code=2)
    assert "no such tracker is installed: expected" in refused.stderr
    longer = ("--set", "budget.max_steps=16")
    kvpipe("experiment", "run", "tiny.toml", *longer, "--report-to", "tensorboard", cwd=tmp_path)
    (events,) = (tmp_path / "runs" / "tiny" / "flat-seed1").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert {"train/ce", "train/kv", "eval/ce"} <= set(accumulator.Tags()["scalars"])
    assert [event.step for event in accumulator.Scalars("eval/ce")] == [2, 4, 6, 8, 10, 12, 14, 16]


def test_held_out_text_that_is_in_the_training_text_stops_an_experiment(
    kvpipe: Any, teacher: Path, tmp_path: Path
) -> None:
    words = ("apples", "pears", "plums", "figs", "nuts", "eggs", "pens", "cups", "keys", "maps")
    questions = [
        f"Tom has {n} {thing} and eats two of them every single day. How many?" for n, thing in enumerate(words)
    ]
    # Every question once more, shouted: the same text for who looks at words, another for who looks at letters.
    lines = [
        json.dumps({"question": q, "answer": "He thinks.\n#### 3"}) for q in (*questions, *map(str.upper, questions))
    ]
    (tmp_path / "twice.jsonl").write_text("\n".join(lines))
    text = EXPERIMENT.format(teacher=teacher).replace("samples = 24", 'dataset = "twice.jsonl"')
    (tmp_path / "tiny.toml").write_text(text)
    refused = kvpipe("experiment", "run", "tiny.toml", cwd=tmp_path, code=2)
    assert "and train overlap: expected no" in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_an_arm_whose_layer_map_does_not_fit_stops_an_experiment_before_it_trains(
    kvpipe: Any, teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "deep.json").write_text(json.dumps({"layers": [0, 1, 1]}))
    arm = '[arms.deep]\nlayer_map = "deep.json"\n'
    (tmp_path / "tiny.toml").write_text(EXPERIMENT.format(teacher=teacher) + arm)
    failed = kvpipe("experiment", "run", "tiny.toml", cwd=tmp_path, code=2)
    assert "Error: arm deep, layer_map: the layer map does not fit: expected 2 layers from 0 to" in failed.stderr
    assert not list((tmp_path / "runs").rglob("config.json"))


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs cores to choose from"
)
def test_a_run_keeps_to_its_cores(store: Path, tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    before = {child.pid for child in multiprocessing.active_children()}
    run = RunProcess(DistillConfig(max_steps=10**6), [store], tmp_path / "runs" / "x", device="cpu", cores=[core])
    try:
        (pid,) = {child.pid for child in multiprocessing.active_children()} - before
        assert pid is not None
        deadline = time.monotonic() + 120
        while run.poll() is None and os.sched_getaffinity(pid) != {core} and time.monotonic() < deadline:
            time.sleep(0.1)
        assert run.poll() is None
        assert os.sched_getaffinity(pid) == {core}
    finally:
        run.stop()


def test_a_run_that_is_killed_has_failed_for_whoever_asks_later(store: Path, tmp_path: Path) -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    path = tmp_path / "runs" / "x"
    run = RunProcess(DistillConfig(max_steps=10**6), [store], path, device="cpu", cores=[0])
    (pid,) = {child.pid for child in multiprocessing.active_children()} - before
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while run.poll() is None:
        time.sleep(0.1)
    assert run.last_word() == "exit code -9 without a word"
    assert failure(path) == run.last_word()
