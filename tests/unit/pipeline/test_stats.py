"""Paired comparisons against scipy and a hand-written Holm, the rules of a verdict, and how often it errs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.pipeline import crossed_bootstrap
from kvpipe.pipeline.crossed_bootstrap import SampleDifferences
from kvpipe.pipeline.questions import LOWER_IS_BETTER, Question
from kvpipe.pipeline.stats import ALPHA, MIN_SEEDS, POWER, Comparison, adjust, compare, distribution_free, mcnemar_test
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.power import TTestPower

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
        ci_low=mean - abs(mean) / 2,
        ci_high=mean + abs(mean) / 2,
        p_value=p_value,
        p_adjusted=p_value,
        effect_size=1.0,
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


def test_equal_differences_tell_nothing_even_where_rounding_makes_them_differ() -> None:
    gap = 0.1
    control = np.array([0.2, 0.213, 0.226, 0.239, 0.252, 0.265])
    found = compare(Question("a", "b"), "ce", scores(control + gap), scores(control))
    assert math.isnan(found.p_value)
    assert found.mean_difference == pytest.approx(gap)
    assert adjust([found])[0].verdict is None


def test_a_run_that_diverged_gives_no_verdict() -> None:
    found = compare(Question("a", "b"), "ce", scores([1, 2, 3, 4, 5, math.nan]), scores([0.5, 1, 2.5, 3, 4, 4]))
    assert found.num_seeds == 6
    assert adjust([found])[0].verdict is None


@given(P_VALUES)
def test_adjusted_p_values_are_holms(p_values: list[float]) -> None:
    found = adjust([comparison(p) for p in p_values])
    assert [c.p_adjusted for c in found] == pytest.approx(holm(p_values))
    assert [c.p_value for c in found] == p_values


def test_holm_on_a_known_family() -> None:
    found = adjust([comparison(p) for p in (0.01, 0.04, 0.03, 0.005)])
    assert [c.p_adjusted for c in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [c.verdict for c in found] == ["better", "inconclusive", "inconclusive", "better"]


def test_a_comparison_without_a_p_value_makes_the_others_no_easier() -> None:
    found = adjust([comparison(0.02), comparison(math.nan), comparison(0.03)])
    assert [c.p_adjusted for c in found if c.verdict is not None] == pytest.approx([0.06, 0.06])
    assert math.isnan(found[1].p_adjusted)
    assert found[1].verdict is None
    assert adjust([]) == []


@pytest.mark.parametrize("seeds", range(MIN_SEEDS))
def test_under_six_seeds_there_is_no_verdict_however_small_p(seeds: int) -> None:
    assert adjust([comparison(1e-9, seeds=seeds)])[0].verdict is None


@pytest.mark.parametrize("metric", sorted(LOWER_IS_BETTER))
def test_a_lower_error_is_better(metric: str) -> None:
    assert adjust([comparison(0.001, mean=-0.1, metric=metric)])[0].verdict == "better"
    assert adjust([comparison(0.001, mean=0.1, metric=metric)])[0].verdict == "worse"


@pytest.mark.parametrize("metric", ["exact_match", "token_accuracy"])
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
        (0.08, "worse"),
        (-0.08, "better"),
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


def test_a_family_at_the_margin_is_said_to_lie_beyond_it_no_more_often_than_alpha() -> None:
    experiments, rng, false_alarms = 300, np.random.default_rng(5), 0
    for _ in range(experiments):
        family = [
            compare(Question(f"a{i}", "b", 0.05), "ce", scores(0.05 + rng.normal(0, 0.02, 8)), scores([0.0] * 8))
            for i in range(8)
        ]
        false_alarms += any(c.verdict in ("better", "worse") for c in adjust(family))
    assert 0 < false_alarms <= stats.binom.ppf(0.999, experiments, ALPHA)


def test_equal_arms_are_told_apart_no_more_often_than_alpha() -> None:
    """A/A: what the seeds share cancels, what is left is noise."""
    experiments, rng = 2000, np.random.default_rng(7)
    found = [
        compare(Question("a", "b"), "ce", *(scores(shared + rng.normal(0, 0.1, 6)) for _ in range(2)))
        for shared in rng.normal(0, 1, (experiments, 6))
    ]
    # Within the binomial interval around ALPHA, and not far below it either: the test is exact.
    low, high = stats.binom.interval(0.999, experiments, ALPHA)
    assert low <= sum(adjust([c])[0].verdict in ("better", "worse") for c in found) <= high
    free = [distribution_free(comparison) for comparison in found[:500]]
    for p_values in ([c.p_sign_flip for c in free], [c.p_wilcoxon for c in free]):
        assert sum(p < ALPHA for p in p_values) <= stats.binom.ppf(0.999, len(free), ALPHA)


def test_a_family_of_equal_arms_is_told_apart_no_more_often_than_alpha() -> None:
    experiments, false_alarms, rng = 400, 0, np.random.default_rng(7)
    for _ in range(experiments):
        seed_effect = rng.normal(0, 1, 6)
        arms = [scores(seed_effect + rng.normal(0, 0.1, 6)) for _ in range(4)]
        pairs = [(1, 0), (2, 0), (3, 0), (2, 1)]
        family = adjust([compare(Question(f"{a}", f"{b}"), "ce", arms[a], arms[b]) for a, b in pairs])
        false_alarms += any(c.verdict in ("better", "worse") for c in family)
    assert 0 < false_alarms <= stats.binom.ppf(0.999, experiments, ALPHA)


@pytest.mark.parametrize("effect", [0.8, 1.3])
def test_a_planted_effect_is_found_as_often_as_the_analytic_power_says(effect: float) -> None:
    experiments, seeds, rng = 1000, 8, np.random.default_rng(11)
    control = scores([0.0] * seeds)
    found = sum(
        adjust([compare(Question("a", "b"), "ce", scores(rng.normal(-effect, 1, seeds)), control)])[0].verdict
        == "better"
        for _ in range(experiments)
    )
    # Power of the two-sided t-test, from the noncentral t distribution.
    critical = stats.t.ppf(1 - ALPHA / 2, seeds - 1)
    power = stats.nct.sf(critical, seeds - 1, effect * math.sqrt(seeds))
    assert abs(found - experiments * power) < 4 * math.sqrt(experiments * power * (1 - power))


def test_what_is_detectable_is_found_with_the_power_that_is_said() -> None:
    rng = np.random.default_rng(13)
    for family in (1, 5):
        comparisons = [
            compare(Question(f"a{i}", "b"), "ce", scores(rng.normal(0, 2, 8)), scores([0.0] * 8)) for i in range(family)
        ]
        for found in adjust(comparisons):
            effect = found.minimum_detectable / np.std(found.differences, ddof=1)
            critical = stats.t.ppf(1 - ALPHA / family / 2, 7)
            shift = effect * math.sqrt(8)
            power = stats.nct.sf(critical, 7, shift) + stats.nct.cdf(-critical, 7, shift)
            assert power == pytest.approx(0.8, abs=1e-3)


def test_sign_flips_are_counted_one_by_one() -> None:
    differences = [0.3, -0.1, 0.5, 0.2, 0.7, -0.05]
    means = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=6)]
    expected = sum(mean >= abs(sum(differences)) - 1e-12 for mean in means) / len(means)
    found = distribution_free(compare(Question("a", "b"), "ce", scores(differences), scores([0.0] * 6)))
    assert found.p_sign_flip == pytest.approx(expected)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(differences).pvalue)


def test_equal_scores_of_unequal_runs_are_not_equivalent_for_that() -> None:
    """Two models that answer as many questions right, but others."""
    values = np.tile([1.0, -1.0], (6, 3))
    samples = SampleDifferences(values, np.ones(6))
    found = compare(Question("a", "b", 0.1), "exact_match", scores([0.5] * 6), scores([0.5] * 6), samples)
    assert math.isnan(found.p_value)
    assert adjust([found])[0].verdict is None


def test_runs_that_are_the_very_same_are_no_difference() -> None:
    same = scores([0.2, 0.3, 0.25, 0.4, 0.1, 0.6])
    for margin, verdict in ((None, "inconclusive"), (0.01, "equivalent")):
        (found,) = adjust([compare(Question("a", "b", margin), "ce", same, same)])
        assert found.verdict == verdict
        assert (found.mean_difference, found.ci_low, found.ci_high) == (0, 0, 0)


@pytest.mark.parametrize(("p_crossed", "verdict"), [(0.01, "better"), (0.03, "inconclusive"), (0.2, "inconclusive")])
def test_a_verdict_holds_for_other_samples_too(p_crossed: float, verdict: str) -> None:
    """By the greater p of the two, corrected like any other."""
    found = adjust([replace(comparison(0.001), p_crossed=p_crossed), comparison(0.9)])
    assert found[0].p_adjusted == pytest.approx(2 * p_crossed)
    assert found[0].verdict == verdict


def with_samples(rng: np.random.Generator, question: Question, mean: float) -> Comparison:
    """Eight seeds that are evaluated on the same 30 samples, which differ in whom they favour."""
    values = mean + rng.normal(0, 0.04, (8, 1)) + rng.normal(0, 0.3, (1, 30)) + rng.normal(0, 0.1, (8, 30))
    differences = SampleDifferences(values, np.ones(30))
    return compare(question, "ce", scores(values.mean(1)), scores([0.0] * 8), differences)


@pytest.mark.parametrize(("margin", "mean"), [(None, 0.0), (0.05, 0.05)])
def test_a_family_is_told_apart_for_other_samples_no_more_often_than_alpha(
    margin: float | None, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the t-test, which knows these samples alone, nearly always sees a difference."""
    monkeypatch.setattr(crossed_bootstrap, "RESAMPLES", 1000)
    experiments, rng, false_alarms, of_seeds = 200, np.random.default_rng(17), 0, 0
    for _ in range(experiments):
        family = adjust([with_samples(rng, Question(f"a{i}", "b", margin), mean) for i in range(4)])
        # At the margin's edge whatever is said but inconclusive is wrong.
        false_alarms += any(c.verdict != "inconclusive" for c in family)
        of_seeds += any(c.p_value < ALPHA / 4 for c in family)
    assert false_alarms <= stats.binom.ppf(0.999, experiments, ALPHA)
    assert of_seeds > 0.5 * experiments or margin is not None


def whole(rng: np.random.Generator, seeds: int, spreads: tuple[float, float, float], effect: float = 0.0) -> Comparison:
    """One question over 40 shared samples, by the rule that reports go by."""
    values = (
        effect
        + rng.normal(0, spreads[0], (seeds, 1))
        + rng.normal(0, spreads[1], (1, 40))
        + rng.normal(0, spreads[2], (seeds, 40))
    )
    differences = SampleDifferences(values, np.ones(40))
    question, control = Question("a", "b"), scores([0.0] * seeds)
    return adjust([compare(question, "ce", scores(values.mean(1)), control, differences)])[0]


SPREADS = {"seeds and samples": (8, (0.05, 0.3, 0.5)), "seeds": (6, (0.1, 0.0, 0.3))}


@pytest.mark.parametrize(("seeds", "spreads"), SPREADS.values(), ids=list(SPREADS))
def test_equal_arms_are_told_apart_and_the_truth_is_covered_as_often_as_it_is_said(
    seeds: int, spreads: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossed_bootstrap, "RESAMPLES", 1000)
    experiments, rng, wrong, covered = 2000, np.random.default_rng(0), 0, 0
    for _ in range(experiments):
        found = whole(rng, seeds, spreads)
        wrong += found.verdict in ("better", "worse")
        covered += found.headline[0] <= 0 <= found.headline[1]
    assert 0 < wrong <= stats.binom.ppf(0.999, experiments, ALPHA)
    assert 0.935 <= covered / experiments <= 0.965


@pytest.mark.parametrize(("seeds", "spreads"), SPREADS.values(), ids=list(SPREADS))
def test_what_is_detectable_is_detected_about_that_often(
    seeds: int, spreads: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the true spread: a report knows it as well as its seeds do."""
    monkeypatch.setattr(crossed_bootstrap, "RESAMPLES", 1000)
    experiments, rng = 400, np.random.default_rng(1)
    by_seed, by_sample, cell = spreads
    error = math.sqrt(by_seed**2 / seeds + by_sample**2 / 40 + cell**2 / (40 * seeds))
    effect = TTestPower().solve_power(nobs=seeds, alpha=ALPHA, power=POWER) * math.sqrt(seeds) * error
    found = [whole(rng, seeds, spreads, -effect) for _ in range(experiments)]
    assert 0.7 < sum(c.verdict == "better" for c in found) / experiments < 0.92
    assert np.median([c.minimum_detectable for c in found]) == pytest.approx(effect, rel=0.1)


def test_the_interval_excludes_zero_where_both_tests_do() -> None:
    rng = np.random.default_rng(23)
    for effect in np.linspace(0, 0.3, 30):
        found = whole(rng, 6, (0.1, 0.2, 0.3), effect)
        (low, high), p_value = found.headline, max(found.p_value, found.p_crossed)
        assert (low > 0 or high < 0) == (p_value < ALPHA) or abs(p_value - ALPHA) < 1e-3


def test_a_margin_that_is_detectable_is_shown_about_that_often() -> None:
    rng = np.random.default_rng(29)
    values = [rng.normal(0, 1, 8) for _ in range(400)]
    margin = (stats.t(7).ppf(1 - ALPHA / 2) + stats.t(7).ppf(0.9)) / math.sqrt(8)
    found = [adjust([compare(Question("a", "b", margin), "ce", scores(v), scores([0.0] * 8))])[0] for v in values]
    assert 0.72 < sum(c.verdict == "equivalent" for c in found) / len(found) < 0.9
    assert np.median([c.minimum_detectable for c in found]) == pytest.approx(margin, rel=0.1)


def test_a_tiny_margin_makes_no_difference_easier_to_find() -> None:
    rng = np.random.default_rng(19)
    for _ in range(20):
        values = scores(rng.normal(0.5, 1, 8))
        plain, with_margin = (
            compare(Question("a", "b", margin), "ce", values, scores([0.0] * 8)) for margin in (None, 1e-9)
        )
        assert with_margin.p_beyond == pytest.approx(plain.p_value, rel=1e-6)


def test_a_margin_asks_two_questions_of_the_family() -> None:
    with_margin = replace(comparison(0.9), margin=0.1, p_beyond=0.02)
    found = adjust([with_margin, comparison(0.9)])
    assert found[0].p_beyond == pytest.approx(0.06)
    assert found[0].verdict == "inconclusive"
    assert adjust([with_margin])[0].verdict == "better"


def test_seeds_that_are_still_to_run_put_a_verdict_off() -> None:
    assert adjust([replace(comparison(1e-6), missing_seeds=(9,))])[0].verdict == "better"
    assert adjust([replace(comparison(1e-6), missing_seeds=(9,), unrun_seeds=(9,))])[0].verdict is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_mcnemar_is_a_sign_test_of_the_samples_that_differ(answers: list[tuple[bool, bool]]) -> None:
    only_arm, only_control, p_value = mcnemar_test(*np.array(answers).T)
    assert only_arm == sum(a and not c for a, c in answers)
    assert only_control == sum(c and not a for a, c in answers)
    discordant = only_arm + only_control
    assert p_value == pytest.approx(stats.binomtest(only_arm, discordant).pvalue if discordant else 1.0)
