"""Paired comparisons of arms over seeds: scipy and statsmodels do the statistics, this file asks them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from .crossed_bootstrap import CrossedBootstrap, SampleDifferences, crossed_bootstrap
from .questions import LOWER_IS_BETTER, Question

Verdict = Literal["better", "worse", "equivalent", "inconclusive"]

ALPHA = 0.05
POWER = 0.8
MIN_SEEDS = 6
"""With fewer paired seeds no sign-based test can reach ALPHA (5 seeds: 0.0625): numbers, no verdict."""

ROUNDING = 1e-12
"""A spread below this share of the mean is float64's, not the seeds'."""

EXACT_SEEDS = 16
"""With more, signs are flipped at random 2**16 times instead of in every way."""

NAN = float("nan")


@dataclass(frozen=True)
class Comparison:
    """`arm` against `control` on one metric. `differences` are arm minus control, one a seed.

    `p_value` is of the paired t-test, `p_crossed` of the same question for other samples too, where there are scores by
    sample; the verdict rests on the greater one, Holm-adjusted. Without a margin the question is a difference from 0;
    with one it is a difference within it, and `p_beyond`, adjusted by then, asks for one beyond it, either side.
    Intervals are at 1 - ALPHA, with a margin at 1 - 2 * ALPHA, which lies within the margin where both one-sided tests
    reject. A `verdict` of None is none: too few seeds, some of them still to run, or no spread.
    """

    arm: str
    control: str
    metric: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean_difference: float
    ci_low: float = NAN
    ci_high: float = NAN
    p_value: float = NAN
    p_adjusted: float = NAN
    effect_size: float = NAN
    p_sign_flip: float = NAN
    p_wilcoxon: float = NAN
    crossed_low: float = NAN
    crossed_high: float = NAN
    crossed_error: float = NAN
    p_crossed: float = NAN
    minimum_detectable: float = NAN
    """What this design finds with a probability of POWER, in units of the metric: a difference; with a margin the least
    margin within which arms that are equal would be shown to be."""
    margin: float | None = None
    p_beyond: float = NAN
    missing_seeds: tuple[int, ...] = ()
    """Declared seeds that are no pair: a run failed, or is still to come."""
    unrun_seeds: tuple[int, ...] = ()
    verdict: Verdict | None = None

    @property
    def num_seeds(self) -> int:
        return len(self.seeds)

    @property
    def confidence(self) -> float:
        """Of the intervals: two one-sided tests at ALPHA go with one of 1 - 2 * ALPHA."""
        return 1 - ALPHA if self.margin is None else 1 - 2 * ALPHA

    @property
    def headline(self) -> tuple[float, float]:
        """The interval to go by. Where there is one over seeds and samples too it holds both, as the verdict takes the
        greater p of both."""
        # A NaN is no end.
        return float(np.fmin(self.ci_low, self.crossed_low)), float(np.fmax(self.ci_high, self.crossed_high))


@dataclass(frozen=True)
class PairedT:
    """One-sided tests of the seeds' mean difference, by Student's t; those of CrossedBootstrap are for other samples
    too."""

    differences: NDArray[np.float64]

    def p_below(self, value: float) -> float:
        return float(stats.ttest_1samp(self.differences, value, alternative="less").pvalue)

    def p_above(self, value: float) -> float:
        return float(stats.ttest_1samp(self.differences, value, alternative="greater").pvalue)


def compare(
    question: Question,
    metric: str,
    arm_scores: Mapping[int, float],
    control_scores: Mapping[int, float],
    samples: SampleDifferences | None = None,
) -> Comparison:
    """Compare over the seeds that both arms finished: a paired t-test, or, with a margin, two one-sided ones
    (Schuirmann 1987), and the same by the crossed bootstrap of `samples`; Cohen's d_z as the effect size.

    With fewer than two seeds, or where every seed gives the same difference (but for rounding), the tests have nothing
    to say: their numbers are NaN. Runs that are the very same, sample by sample where there are any, are no difference
    at all.
    """
    seeds = tuple(sorted(arm_scores.keys() & control_scores.keys()))
    differences = np.array([arm_scores[s] - control_scores[s] for s in seeds])
    mean, margin = float(differences.mean()) if len(seeds) else NAN, question.margin
    asked = (question.arm, question.control, metric)
    found = Comparison(*asked, seeds, tuple(differences.tolist()), mean, margin=margin)
    if len(seeds) < 2 or not np.isfinite(differences).all():
        return found
    if not differences.any() and (samples is None or not samples.values.any()):
        p_value, p_beyond = (1.0, NAN) if margin is None else (0.0, 1.0)
        return replace(found, ci_low=0.0, ci_high=0.0, p_value=p_value, p_beyond=p_beyond)
    spread = float(differences.std(ddof=1))
    if spread <= ROUNDING * abs(mean):
        return found
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(found.confidence)
    p_value, p_beyond = _p_values(PairedT(differences), margin)
    found = replace(
        found,
        ci_low=float(interval.low),
        ci_high=float(interval.high),
        p_value=p_value,
        p_beyond=p_beyond,
        effect_size=mean / spread,
    )
    crossed = crossed_bootstrap(samples) if samples is not None else None
    return found if crossed is None else _with_other_samples(found, crossed)


def _with_other_samples(found: Comparison, crossed: CrossedBootstrap) -> Comparison:
    low, high = crossed.interval(found.confidence)
    p_crossed, p_beyond = _p_values(crossed, found.margin)
    # NaN, where nothing is asked, stays NaN.
    p_beyond = float(np.maximum(found.p_beyond, p_beyond))
    return replace(
        found,
        crossed_low=low,
        crossed_high=high,
        crossed_error=crossed.error,
        p_crossed=p_crossed,
        p_beyond=p_beyond,
    )


def _p_values(tests: PairedT | CrossedBootstrap, margin: float | None) -> tuple[float, float]:
    """p of a difference from 0, two-sided; with a margin that of one within it, and that of one beyond it: on either
    side, hence doubled."""
    if margin is None:
        return min(1.0, 2 * min(tests.p_below(0.0), tests.p_above(0.0))), NAN
    within = max(tests.p_below(margin), tests.p_above(-margin))
    return within, min(1.0, 2 * min(tests.p_below(-margin), tests.p_above(margin)))


def distribution_free(comparison: Comparison) -> Comparison:
    """A difference from 0 by tests that assume less, and need more seeds to find as much: the sign-flip permutation
    test, exact up to EXACT_SEEDS seeds, and Wilcoxon's. They know no margin."""
    differences = np.array(comparison.differences)
    usable = len(differences) >= 2 and np.isfinite(differences).all() and differences.any()
    if comparison.margin is not None or not usable:
        return comparison
    # To exchange the scores of a pair flips the sign of its difference.
    flips = stats.permutation_test(
        (differences, np.zeros_like(differences)),
        lambda arm, control, axis: np.mean(arm - control, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**EXACT_SEEDS,
        rng=np.random.default_rng(0),
    )
    wilcoxon = stats.wilcoxon(differences)
    return replace(comparison, p_sign_flip=float(flips.pvalue), p_wilcoxon=float(wilcoxon.pvalue))


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm's correction over a family of comparisons, and the verdict of each. A margin asks two questions."""
    with_margin = [i for i, c in enumerate(comparisons) if c.margin is not None]
    asked = [float(np.fmax(c.p_value, c.p_crossed)) for c in comparisons]
    family = _holm([*asked, *(comparisons[i].p_beyond for i in with_margin)])
    beyond = dict(zip(with_margin, family[len(comparisons) :], strict=True))
    return [
        _with_verdict(replace(c, p_adjusted=p_value, p_beyond=beyond.get(i, NAN)), len(family))
        for i, (c, p_value) in enumerate(zip(comparisons, family, strict=False))
    ]


def _holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted. NaN stays NaN, and counts: a run that failed makes the others' verdicts no easier."""
    if not p_values:
        return []
    corrected = multipletests(np.nan_to_num(p_values, nan=1.0), alpha=ALPHA, method="holm")[1]
    return np.where(np.isnan(p_values), NAN, corrected).tolist()


def _with_verdict(comparison: Comparison, family: int) -> Comparison:
    detectable = _minimum_detectable(comparison, family)
    return replace(comparison, minimum_detectable=detectable, verdict=_verdict(comparison))


def _minimum_detectable(comparison: Comparison, family: int) -> float:
    """By a t-test with the greater error of the two, over seeds or over seeds and samples, at the level that Holm asks
    of the smallest p of its family, the strictest."""
    if comparison.num_seeds < 2 or math.isnan(comparison.effect_size):
        return NAN
    of_seeds = float(np.std(comparison.differences, ddof=1)) / math.sqrt(comparison.num_seeds)
    detectable = _detectable_difference if comparison.margin is None else _detectable_margin
    return detectable(comparison.num_seeds, family) * float(np.fmax(of_seeds, comparison.crossed_error))


@cache
def _detectable_difference(num_seeds: int, family: int) -> float:
    """In standard errors."""
    effect = TTestPower().solve_power(nobs=num_seeds, alpha=ALPHA / family, power=POWER)
    return float(effect) * math.sqrt(num_seeds)


@cache
def _detectable_margin(num_seeds: int, family: int) -> float:
    """In standard errors: where both one-sided tests reject, if the arms are equal. Approximate: the error is taken as
    known, and each test has half of what may fail."""
    quantile = stats.t(num_seeds - 1).ppf
    return float(quantile(1 - ALPHA / family) + quantile((1 + POWER) / 2))


def _verdict(comparison: Comparison) -> Verdict | None:
    if comparison.num_seeds < MIN_SEEDS or comparison.unrun_seeds or math.isnan(comparison.p_adjusted):
        return None
    if comparison.margin is not None and comparison.p_adjusted < ALPHA:
        return "equivalent"
    decisive = comparison.p_adjusted if comparison.margin is None else comparison.p_beyond
    if decisive < ALPHA:
        lower = comparison.mean_difference < 0
        return "better" if lower == (comparison.metric in LOWER_IS_BETTER) else "worse"
    return "inconclusive"


def mcnemar_test(arm: NDArray[np.bool_], control: NDArray[np.bool_]) -> tuple[int, int, float]:
    """One checkpoint against another on the same samples: how many only the arm's solves, how many only the control's,
    and McNemar's exact p."""
    only_arm, only_control = int((arm & ~control).sum()), int((control & ~arm).sum())
    return only_arm, only_control, float(mcnemar([[0, only_arm], [only_control, 0]], exact=True).pvalue)
