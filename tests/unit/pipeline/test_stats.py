"""Paired comparisons against scipy and a hand-written Holm, the rules of a verdict, and how often it errs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.pipeline.stats import ALPHA, LOWER_IS_BETTER, MIN_SEEDS, Comparison, Question, adjust, compare
from numpy.typing import NDArray
from scipy import stats

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def scores(values: NDArray[np.float64] | list[float]) -> dict[int, float]:
    return {100 + i: float(value) for i, value in enumerate(values)}


def comparison(p_value: float, mean: float = -1.0, metric: str = "ce", seeds: int = MIN_SEEDS) -> Comparison:
    return Comparison(
        arm="a",
        control="b",
        metric=metric,
        seeds=tuple(range(seeds)),
        differences=(mean,) * seeds,
        mean_difference=mean,
        ci_low=mean - 1,
        ci_high=mean + 1,
        p_value=p_value,
        p_adjusted=p_value,
        effect_size=1.0,
        verdict="no verdict",
    )


def holm(p_values: list[float]) -> list[float]:
    """Holm (1979), step down: the i-th smallest of m p-values times m - i, never below the one before it."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


@pytest.mark.parametrize("seeds", [2, 3, 6, 20])
def test_compare_is_scipys_paired_t_test(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    arm, control = rng.normal(0.3, 1, seeds), rng.normal(0, 1, seeds)
    found, expected = compare(Question("a", "b"), "ce", scores(arm), scores(control)), stats.ttest_rel(arm, control)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.ci_low, found.ci_high) == pytest.approx((interval.low, interval.high))
    assert found.mean_difference == pytest.approx(np.mean(arm - control))
    assert found.effect_size == pytest.approx(expected.statistic / math.sqrt(seeds))
    assert found.differences == pytest.approx(tuple(arm - control))


def test_pairs_are_made_by_seed_over_the_seeds_that_both_have() -> None:
    found = compare(Question("a", "b"), "ce", {3: 1.0, 1: 5.0, 9: 7.0}, {9: 6.5, 2: 0.0, 3: 0.25})
    assert found.seeds == (3, 9)
    assert found.num_seeds == 2
    assert found.differences == (0.75, 0.5)


def test_swapping_the_arms_swaps_the_signs() -> None:
    rng = np.random.default_rng(0)
    arm, control = scores(rng.normal(size=6)), scores(rng.normal(size=6))
    there, back = compare(Question("a", "b"), "ce", arm, control), compare(Question("b", "a"), "ce", control, arm)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.mean_difference == pytest.approx(-back.mean_difference)
    assert (there.ci_low, there.ci_high) == pytest.approx((-back.ci_high, -back.ci_low))
    assert there.effect_size == pytest.approx(-back.effect_size)


@pytest.mark.parametrize("seeds", [0, 1])
def test_too_few_seeds_for_a_test_give_nan(seeds: int) -> None:
    found = compare(Question("a", "b"), "ce", scores([1.5] * seeds), scores([1.0] * seeds))
    assert math.isnan(found.p_value)
    assert math.isnan(found.ci_low)
    assert math.isnan(found.effect_size)
    assert found.mean_difference == 0.5 if seeds else math.isnan(found.mean_difference)


@pytest.mark.parametrize("gap", [0.0, 0.1])
def test_equal_differences_tell_nothing_even_where_rounding_makes_them_differ(gap: float) -> None:
    control = np.array([0.2, 0.213, 0.226, 0.239, 0.252, 0.265])
    found = compare(Question("a", "b"), "ce", scores(control + gap), scores(control))
    assert math.isnan(found.p_value)
    assert found.mean_difference == pytest.approx(gap)
    assert adjust([found])[0].verdict == "no verdict"


def test_a_run_that_diverged_gives_no_verdict() -> None:
    found = compare(Question("a", "b"), "ce", scores([1, 2, 3, 4, 5, math.nan]), scores([0.5, 1, 2.5, 3, 4, 4]))
    assert found.num_seeds == 6
    assert adjust([found])[0].verdict == "no verdict"


@given(P_VALUES)
def test_adjusted_p_values_are_holms(p_values: list[float]) -> None:
    found = adjust([comparison(p) for p in p_values])
    assert [c.p_adjusted for c in found] == pytest.approx(holm(p_values))
    assert [c.p_value for c in found] == p_values


def test_holm_on_a_known_family() -> None:
    found = adjust([comparison(p) for p in (0.01, 0.04, 0.03, 0.005)])
    assert [c.p_adjusted for c in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [c.verdict for c in found] == ["better", "inconclusive", "inconclusive", "better"]


def test_a_comparison_without_a_p_value_does_not_count_in_the_family() -> None:
    found = adjust([comparison(0.02), comparison(math.nan), comparison(0.03)])
    assert [c.p_adjusted for c in found if c.verdict != "no verdict"] == pytest.approx([0.04, 0.04])
    assert math.isnan(found[1].p_adjusted)
    assert found[1].verdict == "no verdict"
    assert adjust([]) == []


@pytest.mark.parametrize("seeds", range(MIN_SEEDS))
def test_under_six_seeds_there_is_no_verdict_however_small_p(seeds: int) -> None:
    assert adjust([comparison(1e-9, seeds=seeds)])[0].verdict == "no verdict"


@pytest.mark.parametrize("metric", sorted(LOWER_IS_BETTER))
def test_a_lower_error_is_better(metric: str) -> None:
    assert adjust([comparison(0.001, mean=-0.1, metric=metric)])[0].verdict == "better"
    assert adjust([comparison(0.001, mean=0.1, metric=metric)])[0].verdict == "worse"


@pytest.mark.parametrize("metric", ["exact_match", "token_accuracy", "cosine_key", "cka_value"])
def test_a_higher_score_is_better(metric: str) -> None:
    assert adjust([comparison(0.001, mean=0.1, metric=metric)])[0].verdict == "better"
    assert adjust([comparison(0.001, mean=-0.1, metric=metric)])[0].verdict == "worse"


@pytest.mark.parametrize(("p_value", "verdict"), [(0.0499, "better"), (0.05, "inconclusive"), (0.9, "inconclusive")])
def test_a_verdict_needs_an_adjusted_p_below_alpha(p_value: float, verdict: str) -> None:
    assert adjust([comparison(p_value)])[0].verdict == verdict


def test_a_large_effect_is_found_at_six_seeds() -> None:
    rng = np.random.default_rng(1)
    control = rng.normal(0.22, 0.01, 6)
    arm = control - 0.15 + rng.normal(0, 0.01, 6)
    assert adjust([compare(Question("a", "b"), "ce", scores(arm), scores(control))])[0].verdict == "better"


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        (0.0, "equivalent"),
        (0.03, "equivalent"),
        (0.05, "inconclusive"),
        (0.08, "not equivalent"),
        (-0.08, "not equivalent"),
    ],
)
def test_a_margin_asks_for_equivalence(gap: float, verdict: str) -> None:
    """Against two one-sided t-tests by hand: the difference is above -margin, and below margin."""
    rng = np.random.default_rng(2)
    control = rng.normal(0.2, 0.05, 8)
    arm = control + gap + rng.normal(0, 0.01, 8)
    (found,) = adjust([compare(Question("a", "b", 0.05), "ce", scores(arm), scores(control))])
    above = stats.ttest_1samp(arm - control, -0.05, alternative="greater").pvalue
    below = stats.ttest_1samp(arm - control, 0.05, alternative="less").pvalue
    assert found.p_value == pytest.approx(max(above, below))
    # The interval lies within the margin where both tests reject, and only there.
    assert (max(-found.ci_low, found.ci_high) < 0.05) == (found.p_value < ALPHA)
    assert found.confidence == pytest.approx(0.9)
    assert found.verdict == verdict


def test_arms_that_differ_by_the_margin_are_called_equivalent_no_more_often_than_alpha() -> None:
    experiments, rng = 1000, np.random.default_rng(3)
    found = [
        compare(Question("a", "b", 0.05), "ce", scores(0.05 + rng.normal(0, 0.02, 8)), scores([0.0] * 8)).p_value
        for _ in range(experiments)
    ]
    assert 0 < sum(p < ALPHA for p in found) <= stats.binom.ppf(0.999, experiments, ALPHA)


def test_a_family_at_the_margin_is_called_not_equivalent_no_more_often_than_alpha() -> None:
    experiments, rng, false_alarms = 300, np.random.default_rng(5), 0
    for _ in range(experiments):
        family = [
            compare(Question(f"a{i}", "b", 0.05), "ce", scores(0.05 + rng.normal(0, 0.02, 8)), scores([0.0] * 8))
            for i in range(8)
        ]
        false_alarms += any(c.verdict == "not equivalent" for c in adjust(family))
    assert 0 < false_alarms <= stats.binom.ppf(0.999, experiments, ALPHA)


def test_equal_arms_are_told_apart_no_more_often_than_alpha() -> None:
    experiments, false_alarms = 400, 0
    rng = np.random.default_rng(7)
    for _ in range(experiments):
        seed_effect = rng.normal(0, 1, 6)
        arms = [scores(seed_effect + rng.normal(0, 0.1, 6)) for _ in range(4)]
        pairs = [(1, 0), (2, 0), (3, 0), (2, 1)]
        family = adjust([compare(Question(f"{a}", f"{b}"), "ce", arms[a], arms[b]) for a, b in pairs])
        false_alarms += any(c.verdict in ("better", "worse") for c in family)
    # What a family-wise rate of ALPHA would exceed once in a thousand times.
    assert false_alarms <= stats.binom.ppf(0.999, experiments, ALPHA)
    assert false_alarms > 0
