"""`kvpipe experiment run`: two arms by two seeds, then again with an arm that cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXPERIMENT = """
name = "tiny"
primary_metric = "ce"
seeds = [1, 2]

[extract]
model = "{teacher}"
store = "stores/tiny.zarr"
samples = 24
eval_samples = 4

[base]
epochs = 2
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

    again, greedy = kvpipe.many(
        [
            ["experiment", "run", "tiny.toml", "--jobs", 2],
            ["experiment", "run", "greedy.toml", "--jobs", 2, "--report-dir", "reports/greedy"],
        ],
        cwd=tmp_path,
    )
    assert again.code == 0
    assert again.stdout == first.stdout
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
    assert "greedy-seed1" in (tmp_path / "reports" / "greedy" / "report.md").read_text()
    by_arm = {comparison["arm"]: comparison for comparison in results["comparisons"]["ce"]}
    assert by_arm["greedy"]["verdict"] == "no verdict"
    assert by_arm["greedy"]["seeds"] == []
    assert by_arm["flat"]["seeds"] == [1, 2]


def _check_report(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(), parse_constant=_no_constants)
    assert results["failures"] == {}
    assert [run["name"] for run in results["runs"]] == RUNS
    scores = {(run["arm"], run["seed"]): run["scores"]["ce"] for run in results["runs"]}
    pairings = {(run["arm"], run["seed"]): run["record"]["pairing"] for run in results["runs"]}
    for seed in (1, 2):
        assert pairings["flat", seed] == pairings["none", seed]
    assert pairings["flat", 1] != pairings["flat", 2]
    assert all(run["record"]["teacher_forwards"] == 0 for run in results["runs"])
    assert all(len(run["curve"]) == 2 for run in results["runs"])
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
