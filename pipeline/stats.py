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
from statsmodels.stats.weightstats import DescrStatsW

from .crossed_bootstrap import SampleDifferences, crossed_interval

Verdict = Literal["better", "worse", "equivalent", "inconclusive"]

ALPHA = 0.05
POWER = 0.8
MIN_SEEDS = 6
"""With fewer paired seeds no sign-based test can reach ALPHA (5 seeds: 0.0625): numbers, no verdict."""

ROUNDING = 1e-12
"""A spread below this share of the mean is float64's, not the seeds'."""

EXACT_SEEDS = 16
"""With more, signs are flipped at random 2**16 times instead of in every way."""

COMPARED_METRICS = ("ce", "ce_auc", "exact_match", "token_accuracy")
"""What every comparison is made on; an experiment declares one of them as primary."""

LOWER_IS_BETTER = {"ce", "ce_auc", "nmse_key", "nmse_value"}

NAN = float("nan")


@dataclass(frozen=True)
class Question:
    """Whether `arm` differs from `control`; with a `margin`, whether they differ by less than that on the primary
    metric."""

    arm: str
    control: str
    margin: float | None = None


@dataclass(frozen=True)
class Comparison:
    """`arm` against `control` on one metric. `differences` are arm minus control, one a seed.

    `p_value` is of the paired t-test, on which the verdict rests; with a `margin` that of equivalence, the greater one
    of two one-sided tests. The interval is at 1 - ALPHA, with a margin at 1 - 2 * ALPHA, which lies within the margin
    where both tests reject. A `verdict` of None is none: too few seeds, or no spread.
    """

    arm: str
    control: str
    metric: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean_difference: float
    ci_low: float
    ci_high: float
    p_value: float
    p_adjusted: float
    effect_size: float
    p_sign_flip: float = NAN
    p_wilcoxon: float = NAN
    crossed_low: float = NAN
    crossed_high: float = NAN
    """Interval for other seeds and other samples, where there are scores by sample."""
    minimum_detectable: float = NAN
    """What this many seeds of this spread find with a probability of POWER, in units of the metric."""
    margin: float | None = None
    p_beyond: float = NAN
    """With a margin: of a difference beyond it, on the side where it is."""
    verdict: Verdict | None = None

    @property
    def num_seeds(self) -> int:
        return len(self.seeds)

    @property
    def confidence(self) -> float:
        """Of the intervals: two one-sided tests at ALPHA go with one of 1 - 2 * ALPHA."""
        return _confidence(self.margin)

    @property
    def headline(self) -> tuple[float, float]:
        """The interval to go by: over seeds and samples where there is one, else over seeds."""
        return (self.ci_low, self.ci_high) if math.isnan(self.crossed_low) else (self.crossed_low, self.crossed_high)


def compare(
    question: Question,
    metric: str,
    arm_scores: Mapping[int, float],
    control_scores: Mapping[int, float],
    samples: SampleDifferences | None = None,
) -> Comparison:
    """Compare over the seeds that both arms finished: a paired t-test, or, with a margin, two one-sided ones
    (Schuirmann 1987); Cohen's d_z as the effect size.

    With fewer than two seeds, or where every seed gives the same difference other than zero (but for rounding), the
    tests have nothing to say: their numbers are NaN. Runs that are the very same are no difference at all.
    """
    seeds = tuple(sorted(arm_scores.keys() & control_scores.keys()))
    differences = np.array([arm_scores[s] - control_scores[s] for s in seeds])
    mean = float(differences.mean()) if len(seeds) else NAN
    found = Comparison(
        question.arm,
        question.control,
        metric,
        seeds,
        tuple(differences.tolist()),
        mean,
        *(NAN,) * 5,
        margin=question.margin,
    )
    if len(seeds) < 2 or not np.isfinite(differences).all():
        return found
    if not differences.any():
        p_value = 1.0 if question.margin is None else 0.0
        return replace(found, ci_low=0.0, ci_high=0.0, p_value=p_value, p_beyond=1.0)
    spread = float(differences.std(ddof=1))
    if spread <= ROUNDING * abs(mean):
        return found
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(found.confidence)
    crossed = crossed_interval(samples, found.confidence) if samples is not None else (NAN, NAN)
    p_value, p_beyond = float(test.pvalue), NAN
    if question.margin is not None:
        p_value, p_beyond = _within(differences, question.margin)
    return replace(
        found,
        ci_low=float(interval.low),
        ci_high=float(interval.high),
        p_value=p_value,
        effect_size=mean / spread,
        crossed_low=crossed[0],
        crossed_high=crossed[1],
        p_beyond=p_beyond,
    )


def _confidence(margin: float | None) -> float:
    return 1 - ALPHA if margin is None else 1 - 2 * ALPHA


def _within(differences: NDArray[np.float64], margin: float) -> tuple[float, float]:
    """p of a difference within the margin, and of one beyond it."""
    p_within = float(DescrStatsW(differences).ttost_mean(-margin, margin)[0])
    towards_zero = -math.copysign(1, differences.mean()) * differences
    return p_within, float(stats.ttest_1samp(towards_zero, -margin, alternative="less").pvalue)


def distribution_free(comparison: Comparison) -> Comparison:
    """The same question of the same seeds by tests that assume less, and need more seeds to find as much: the sign-flip
    permutation test, exact up to EXACT_SEEDS seeds, and Wilcoxon's."""
    differences = np.array(comparison.differences)
    if len(differences) < 2 or not np.isfinite(differences).all() or not differences.any():
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
    """Holm's correction over a family of comparisons, and the verdict of each. Differences beyond their margins are a
    family of their own."""
    adjusted, beyond = (_holm([p(c) for c in comparisons]) for p in (lambda c: c.p_value, lambda c: c.p_beyond))
    family = sum(not math.isnan(c.p_value) for c in comparisons)
    return [
        replace(
            comparison,
            p_adjusted=p_value,
            p_beyond=p_beyond,
            minimum_detectable=_minimum_detectable(comparison, family),
            verdict=_verdict(comparison, p_value, p_beyond),
        )
        for comparison, p_value, p_beyond in zip(comparisons, adjusted, beyond, strict=True)
    ]


def _holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted; NaN stays NaN and does not count."""
    tested = [p_value for p_value in p_values if not math.isnan(p_value)]
    corrected = iter(multipletests(tested, alpha=ALPHA, method="holm")[1] if tested else ())
    return [p_value if math.isnan(p_value) else float(next(corrected)) for p_value in p_values]


def _minimum_detectable(comparison: Comparison, family: int) -> float:
    """At the level that Holm asks of the smallest p of its family, the strictest."""
    if comparison.num_seeds < 2 or math.isnan(comparison.effect_size):
        return NAN
    return _detectable_effect(comparison.num_seeds, family) * float(np.std(comparison.differences, ddof=1))


@cache
def _detectable_effect(num_seeds: int, family: int) -> float:
    """As Cohen's d_z."""
    return float(TTestPower().solve_power(nobs=num_seeds, alpha=ALPHA / family, power=POWER))


def _verdict(comparison: Comparison, p_adjusted: float, p_beyond: float) -> Verdict | None:
    """Better, worse and equivalent take both: the test over the seeds, and the interval for other samples too."""
    if comparison.num_seeds < MIN_SEEDS or math.isnan(p_adjusted):
        return None
    (low, high), margin = comparison.headline, comparison.margin
    if margin is not None and p_adjusted < ALPHA and -margin < low and high < margin:
        return "equivalent"
    decisive, bound = (p_adjusted, 0.0) if margin is None else (p_beyond, margin)
    if decisive < ALPHA and (low > bound or high < -bound):
        lower = comparison.mean_difference < 0
        return "better" if lower == (comparison.metric in LOWER_IS_BETTER) else "worse"
    return "inconclusive"


def mcnemar_test(arm: NDArray[np.bool_], control: NDArray[np.bool_]) -> tuple[int, int, float]:
    """One checkpoint against another on the same samples: how many only the arm's solves, how many only the control's,
    and McNemar's exact p."""
    only_arm, only_control = int((arm & ~control).sum()), int((control & ~arm).sum())
    return only_arm, only_control, float(mcnemar([[0, only_arm], [only_control, 0]], exact=True).pvalue)
