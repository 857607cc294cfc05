"""Scores by sample from what runs leave, and what pairs of runs make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvpipe.pipeline.held_out_scores import HeldOutScores, checkpoint_pairs, read_scores, sample_differences
from kvpipe.pipeline.questions import Question
from kvpipe.pipeline.run_directory import RunDirectory

QUESTION = Question("flat", "none")


def written(folder: Path, exact: list[bool | None], ce: list[float] | None = None) -> HeldOutScores:
    run = RunDirectory(folder)
    folder.mkdir()
    lines = [
        {"id": str(i), "tokens": 2 + i, "ce": (ce or [0.5] * len(exact))[i], "token_accuracy": 0.25, "exact": solved}
        for i, solved in enumerate(exact)
    ]
    run.predictions.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return read_scores(run)


def test_scores_are_read_by_sample(tmp_path: Path) -> None:
    found = written(tmp_path / "run", [True, False], [0.5, 0.75])
    assert found.tokens.tolist() == [2, 3]
    assert {name: scores.tolist() for name, scores in found.by_metric.items()} == {
        "ce": [0.5, 0.75],
        "token_accuracy": [0.25, 0.25],
        "exact_match": [1, 0],
    }
    assert "exact_match" not in written(tmp_path / "other", [True, None]).by_metric


def test_differences_are_by_seed_and_sample_and_weigh_tokens(tmp_path: Path) -> None:
    scores = {
        (arm, seed): written(tmp_path / f"{arm}{seed}", [True, False], [seed + offset, seed * offset])
        for arm, offset in (("flat", 2.0), ("none", 1.0))
        for seed in (3, 5)
    }
    found = sample_differences(QUESTION, "ce", [3, 5], scores)
    assert found is not None
    assert found.values.tolist() == [[1, 3], [1, 5]]
    assert found.weights.tolist() == [2, 3]
    exact = sample_differences(QUESTION, "exact_match", [5], scores)
    assert exact is not None
    assert exact.weights.tolist() == [1, 1]
    assert sample_differences(QUESTION, "ce_auc", [3, 5], scores) is None
    assert sample_differences(QUESTION, "ce", [], scores) is None


def test_the_weighted_mean_over_samples_is_the_runs_score(make_experiment: Callable[..., Any]) -> None:
    """So that the interval over samples is around the very difference that is reported."""
    finished = make_experiment({"none": 0.9, "flat": 0.4})
    for run in finished.config.runs:
        scores = read_scores(RunDirectory(finished.runs_dir / run.name))
        mean = np.average(scores.by_metric["ce"], weights=scores.tokens)
        assert mean == pytest.approx(finished.outcome.records[run.name]["metrics"]["ce"])


def test_students_of_one_seed_are_compared_problem_by_problem(tmp_path: Path) -> None:
    scores = {
        ("flat", 1): written(tmp_path / "a", [True, True, True, False]),
        ("none", 1): written(tmp_path / "b", [False, False, True, True]),
        ("flat", 2): written(tmp_path / "c", [True]),
        ("flat", 3): written(tmp_path / "d", [None]),
        ("none", 3): written(tmp_path / "e", [True]),
    }
    (pair,) = checkpoint_pairs(QUESTION, scores)
    assert (pair.seed, pair.only_arm, pair.only_control) == (1, 2, 1)
    assert pair.p_value == pytest.approx(1.0)
