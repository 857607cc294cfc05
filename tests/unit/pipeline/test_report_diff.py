"""Two reports side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kvpipe.kvcache.errors import ConfigError
from kvpipe.pipeline.report import write_report
from kvpipe.pipeline.report_diff import Difference, diff_reports
from kvpipe.pipeline.results import collect

ARMS = {"none": 0.9, "flat": 0.4}

MakeExperiment = Callable[..., Any]


def report(make_experiment: MakeExperiment, folder: Path, **options: Any) -> Path:
    finished = make_experiment(**{"arms": ARMS, **options})
    write_report(collect(finished.config, finished.outcome, finished.runs_dir), folder)
    return folder


def test_a_report_does_not_differ_from_itself_made_again(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    found = diff_reports(*(report(make_experiment, tmp_path / name) for name in "ab"))
    assert found.declared == []
    assert found.outcomes == []


def test_what_was_declared_and_what_came_out_is_told_apart(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    first = report(make_experiment, tmp_path / "a")
    second = report(make_experiment, tmp_path / "b", arms={"none": 0.9, "wide": 0.9}, seeds=7)
    found = diff_reports(first, second / "results.json")
    declared = {difference.what: difference for difference in found.declared}
    assert declared["seeds"] == Difference("seeds", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6])
    assert declared["arm flat"].second is None
    assert declared["arm wide"].first is None
    outcomes = {difference.what: difference for difference in found.outcomes}
    assert outcomes["flat - none"].first.startswith("better (-0.5")
    assert outcomes["wide - none"].second.startswith("inconclusive (")
    assert outcomes["mean ce of none"].second.endswith("over 7 seeds")


def test_a_failed_run_is_an_outcome(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    first = report(make_experiment, tmp_path / "a")
    second = report(make_experiment, tmp_path / "b", without={"flat-seed2": "out of memory"})
    outcomes = {difference.what: difference for difference in diff_reports(first, second).outcomes}
    assert outcomes["failed flat-seed2"] == Difference("failed flat-seed2", None, "out of memory")
    assert outcomes["flat - none"].second.startswith("no verdict")


@pytest.mark.parametrize("text", [None, "garbage", "[]", "{}", '{"declared": {}}', '{"stores": [], "commands": []}'])
def test_what_is_no_report_is_refused(make_experiment: MakeExperiment, tmp_path: Path, text: str | None) -> None:
    other = tmp_path / "other"
    other.mkdir()
    if text is not None:
        (other / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=f"no report at {other}"):
        diff_reports(report(make_experiment, tmp_path / "a"), other)
