"""Paired comparisons of arms over seeds: scipy and statsmodels do the statistics, this file asks them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

Verdict = Literal["better", "worse", "equivalent", "not equivalent", "inconclusive", "no verdict"]

ALPHA = 0.05
MIN_SEEDS = 6
"""With fewer paired seeds no sign-based test can reach ALPHA (5 seeds: 0.0625): numbers, no verdict."""

ROUNDING = 1e-12
"""A spread below this share of the mean is float64's, not the seeds'."""

COMPARED_METRICS = ("ce", "ce_auc", "exact_match", "token_accuracy")
"""What every comparison is made on; an experiment declares one of them as primary."""

LOWER_IS_BETTER = {"ce", "ce_auc", "nmse_key", "nmse_value"}


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

    With a `margin` the p-value is that of equivalence, the greater one of two one-sided tests, and the interval the one
    that lies within the margin where both reject.
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
    verdict: Verdict
    margin: float | None = None
    p_beyond: float = float("nan")
    """With a margin: of a difference beyond it, on the side where it is."""

    @property
    def num_seeds(self) -> int:
        return len(self.seeds)

    @property
    def confidence(self) -> float:
        """Of the interval: two one-sided tests at ALPHA go with one of 1 - 2 * ALPHA."""
        return 1 - ALPHA if self.margin is None else 1 - 2 * ALPHA


def compare(
    question: Question, metric: str, arm_scores: Mapping[int, float], control_scores: Mapping[int, float]
) -> Comparison:
    """Paired t-test over the seeds that both arms finished, or, with a margin, two one-sided ones (Schuirmann 1987);
    Cohen's d_z as the effect size.

    With fewer than two seeds, or where every seed gives the same difference (but for rounding), the test has
    nothing to say: its numbers are NaN.
    """
    seeds = tuple(sorted(arm_scores.keys() & control_scores.keys()))
    differences = np.array([arm_scores[s] - control_scores[s] for s in seeds])
    mean = float(differences.mean()) if len(seeds) else float("nan")
    spread = float(differences.std(ddof=1)) if len(seeds) > 1 else 0.0
    low = high = p_value = p_beyond = effect = float("nan")
    if spread > ROUNDING * abs(mean):
        test = stats.ttest_1samp(differences, 0.0)
        interval = test.confidence_interval(1 - ALPHA if question.margin is None else 1 - 2 * ALPHA)
        low, high, p_value = float(interval.low), float(interval.high), float(test.pvalue)
        if question.margin is not None:
            p_value = float(DescrStatsW(differences).ttost_mean(-question.margin, question.margin)[0])
            towards_zero = -math.copysign(1, mean) * differences
            p_beyond = float(stats.ttest_1samp(towards_zero, -question.margin, alternative="less").pvalue)
        effect = mean / spread
    return Comparison(
        arm=question.arm,
        control=question.control,
        metric=metric,
        seeds=seeds,
        differences=tuple(differences.tolist()),
        mean_difference=mean,
        ci_low=low,
        ci_high=high,
        p_value=p_value,
        p_adjusted=p_value,
        effect_size=effect,
        verdict="no verdict",
        margin=question.margin,
        p_beyond=p_beyond,
    )


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm's correction over a family of comparisons, and the verdict of each. Differences beyond their margins are a
    family of their own."""
    adjusted, beyond = (_holm([p(c) for c in comparisons]) for p in (lambda c: c.p_value, lambda c: c.p_beyond))
    return [
        replace(comparison, p_adjusted=p_value, p_beyond=p_beyond, verdict=_verdict(comparison, p_value, p_beyond))
        for comparison, p_value, p_beyond in zip(comparisons, adjusted, beyond, strict=True)
    ]


def _holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted; NaN stays NaN and does not count."""
    tested = [p_value for p_value in p_values if not math.isnan(p_value)]
    corrected = iter(multipletests(tested, alpha=ALPHA, method="holm")[1] if tested else ())
    return [p_value if math.isnan(p_value) else float(next(corrected)) for p_value in p_values]


def _verdict(comparison: Comparison, p_adjusted: float, p_beyond: float) -> Verdict:
    if comparison.num_seeds < MIN_SEEDS or math.isnan(p_adjusted):
        return "no verdict"
    if p_beyond < ALPHA:
        return "not equivalent"
    if not p_adjusted < ALPHA:
        return "inconclusive"
    if comparison.margin is not None:
        return "equivalent"
    improved = (comparison.mean_difference < 0) == (comparison.metric in LOWER_IS_BETTER)
    return "better" if improved else "worse"
