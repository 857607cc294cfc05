"""From run directories to numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kvpipe.kvcache.errors import ConfigError
from kvpipe.pipeline.questions import Question
from kvpipe.pipeline.results import arm_summary, collect
from scipy import stats

ARMS = {"none": 0.9, "flat": 0.4, "structured": 0.4}

MakeExperiment = Callable[..., Any]


def test_scores_and_curves_are_those_of_the_run_directories(make_experiment: MakeExperiment) -> None:
    finished = make_experiment(ARMS)
    results = collect(finished.config, finished.outcome, finished.runs_dir)
    assert results.arms() == ["none", "flat", "structured"]
    assert len(results.runs) == 18
    for run in results.runs:
        record = finished.outcome.records[run.name]
        assert run.name == f"{run.arm}-seed{run.seed}"
        assert run.scores["ce"] == record["metrics"]["ce"]
        assert "exact_match" not in run.scores
        ce = run.scores["ce"]
        assert run.curve == [(10, ce + 1 / 10), (20, ce + 1 / 20), (40, ce + 1 / 40)]
        assert run.record["steps"] == 40
        # The trapezoids under the curve above, over its width.
        assert run.scores["ce_auc"] == pytest.approx(ce + (10 * 0.075 + 20 * 0.0375) / 30)


def test_every_comparison_is_paired_by_seed(make_experiment: MakeExperiment) -> None:
    finished = make_experiment(ARMS, comparisons=[Question("flat", "none"), Question("structured", "flat")])
    results = collect(finished.config, finished.outcome, finished.runs_dir)
    assert list(results.comparisons) == ["ce", "ce_auc", "exact_match", "token_accuracy"]
    scores = {arm: [run.scores["ce"] for run in results.runs if run.arm == arm] for arm in ARMS}
    against_none, against_flat = results.comparisons["ce"]
    assert (against_none.arm, against_none.control) == ("flat", "none")
    assert against_none.p_value == pytest.approx(stats.ttest_rel(scores["flat"], scores["none"]).pvalue)
    assert against_none.verdict == "better"
    assert against_flat.p_value == pytest.approx(stats.ttest_rel(scores["structured"], scores["flat"]).pvalue)
    assert against_flat.verdict == "inconclusive"
    assert [c.verdict for c in results.comparisons["token_accuracy"]] == ["better", "inconclusive"]
    # Nobody generated an answer.
    assert [(c.num_seeds, c.verdict) for c in results.comparisons["exact_match"]] == [(0, None)] * 2


def test_a_margin_holds_on_the_primary_metric_alone(make_experiment: MakeExperiment) -> None:
    finished = make_experiment(ARMS, comparisons=[Question("structured", "flat", 0.02)])
    comparisons = collect(finished.config, finished.outcome, finished.runs_dir).comparisons
    assert [(c.margin, c.verdict) for c in comparisons["ce"]] == [(0.02, "equivalent")]
    assert [(c.margin, c.verdict) for c in comparisons["token_accuracy"]] == [(None, "inconclusive")]


def test_a_pair_that_is_asked_about_twice_is_compared_once_on_other_metrics(make_experiment: MakeExperiment) -> None:
    twice = [Question("structured", "flat"), Question("structured", "flat", 0.02)]
    finished = make_experiment(ARMS, comparisons=twice)
    comparisons = collect(finished.config, finished.outcome, finished.runs_dir).comparisons
    assert [c.margin for c in comparisons["ce"]] == [None, 0.02]
    assert [c.margin for c in comparisons["token_accuracy"]] == [None]


def test_a_pair_with_a_failed_run_is_left_out(make_experiment: MakeExperiment) -> None:
    finished = make_experiment(ARMS, without={"flat-seed2": "out of memory"})
    results = collect(finished.config, finished.outcome, finished.runs_dir)
    assert results.failures == {"flat-seed2": "out of memory"}
    flat, structured = results.comparisons["ce"]
    assert flat.seeds == (0, 1, 3, 4, 5)
    assert flat.verdict is None
    assert structured.seeds == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("part", ["student_init", "data_order", "eval_samples"])
def test_runs_that_are_no_pair_are_refused(make_experiment: MakeExperiment, part: str) -> None:
    def edit(name: str, record: dict[str, Any]) -> None:
        if name == "flat-seed3":
            record["pairing"][part] = "another"

    finished = make_experiment(ARMS, edit=edit)
    with pytest.raises(ConfigError, match="flat-seed3 and none-seed3 are not a pair"):
        collect(finished.config, finished.outcome, finished.runs_dir)


@pytest.mark.parametrize("metric", ["ce_auc", "token_accuracy"])
def test_a_secondary_metric_may_be_the_primary_one(make_experiment: MakeExperiment, metric: str) -> None:
    finished = make_experiment(ARMS, primary_metric=metric)
    results = collect(finished.config, finished.outcome, finished.runs_dir)
    assert next(iter(results.comparisons)) == metric
    assert metric not in list(results.comparisons)[1:]


def test_savings_are_measured_sums(make_experiment: MakeExperiment) -> None:
    finished = make_experiment(ARMS, seeds=2)
    savings = collect(finished.config, finished.outcome, finished.runs_dir).savings
    # Four runs with KV of 8 and 9 seconds; the store took the teacher 12.5.
    assert savings.runs == 4
    assert savings.teacher_seconds == 12.5
    assert savings.student_seconds == pytest.approx(8.5)
    assert savings.offline_seconds == pytest.approx(12.5 + 4 * 8.5)
    assert savings.online_seconds == pytest.approx(4 * (12.5 + 8.5))


def test_an_online_run_pays_for_the_teacher_of_its_own_store_alone(
    make_experiment: MakeExperiment, make_segmented_store: Callable[..., Any]
) -> None:
    finished = make_experiment(ARMS, seeds=2)
    other, _ = make_segmented_store([5, 9, 12])
    stores = {"other": replace(finished.config.extract, store=other.path)}
    config = replace(finished.config, stores=stores, arm_stores={"flat": ("other",)})
    savings = collect(config, finished.outcome, finished.runs_dir).savings
    assert savings.teacher_seconds == 2 * 12.5
    assert savings.offline_seconds == pytest.approx(2 * 12.5 + 4 * 8.5)
    assert savings.online_seconds == pytest.approx(4 * (12.5 + 8.5))


def test_an_arm_is_summed_up_over_its_seeds(make_experiment: MakeExperiment) -> None:
    finished = make_experiment(ARMS, without={"none-seed0": "stopped"})
    results = collect(finished.config, finished.outcome, finished.runs_dir)
    values = [run.scores["ce"] for run in results.runs if run.arm == "none"]
    assert arm_summary(results, "ce")["none"] == pytest.approx((np.mean(values), np.std(values, ddof=1), 5))
    assert arm_summary(results, "exact_match") == {}
    single = make_experiment(ARMS, seeds=1)
    results = collect(single.config, single.outcome, single.runs_dir)
    assert arm_summary(results, "ce")["flat"][1:] == pytest.approx((math.nan, 1), nan_ok=True)
