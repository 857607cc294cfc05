"""The bootstrap over seeds and samples: how often its interval holds the truth, that its p-values agree, and what it
does not know."""

from __future__ import annotations

import numpy as np
import pytest
from kvpipe.pipeline import crossed_bootstrap as module
from kvpipe.pipeline.crossed_bootstrap import SampleDifferences, crossed_bootstrap
from scipy import stats


def drawn(rng: np.random.Generator, seeds: int, samples: int, between: tuple[float, float, float]) -> SampleDifferences:
    """Differences around zero that vary by seed, by sample, and from cell to cell."""
    by_seed, by_sample, cell = between
    values = (
        rng.normal(0, by_seed, (seeds, 1))
        + rng.normal(0, by_sample, (1, samples))
        + rng.normal(0, cell, (seeds, samples))
    )
    return SampleDifferences(values, rng.integers(5, 40, samples).astype(float))


def interval(differences: SampleDifferences, confidence: float) -> tuple[float, float]:
    found = crossed_bootstrap(differences)
    assert found is not None
    return found.interval(confidence)


def test_an_interval_over_seeds_alone_would_not_hold_for_other_samples() -> None:
    """Why there is another: the t interval of these differences misses far more often than it says."""
    experiments, rng, covered = 500, np.random.default_rng(0), 0
    for _ in range(experiments):
        differences = drawn(rng, 8, 40, (0.05, 0.3, 0.5))
        means = np.average(differences.values, axis=1, weights=differences.weights)
        interval = stats.ttest_1samp(means, 0).confidence_interval(0.95)
        covered += interval.low <= 0 <= interval.high
    assert covered / experiments < 0.85


def test_the_interval_is_around_the_weighted_mean_and_the_same_every_time() -> None:
    differences = drawn(np.random.default_rng(1), 6, 50, (0.1, 0.1, 0.1))
    mean = np.average(differences.values.mean(0), weights=differences.weights)
    low, high = interval(differences, 0.95)
    assert low < mean < high
    assert interval(differences, 0.95) == (low, high)
    narrower = interval(differences, 0.9)
    assert low < narrower[0] < narrower[1] < high


def test_a_resample_has_the_mean_and_the_error_of_the_rows_and_columns_it_drew() -> None:
    rng = np.random.default_rng(2)
    differences = drawn(rng, 5, 7, (1, 1, 1))
    seeds, samples = rng.integers(0, 5, 5), rng.integers(0, 7, 7)
    counts = (np.bincount(*rows)[None].astype(float) for rows in ((seeds, None, 5), (samples, None, 7)))
    (mean,), (error,) = module._mean_and_error(differences.values, differences.weights, *counts)
    table, weights = differences.values[np.ix_(seeds, samples)], differences.weights[samples]
    of_seeds, of_samples = np.average(table, axis=1, weights=weights), table.mean(0)
    assert mean == pytest.approx(of_seeds.mean())
    spread = (weights**2 * (of_samples - mean) ** 2).sum() / weights.sum() ** 2 * 7 / 6
    assert error == pytest.approx(np.sqrt(of_seeds.var(ddof=1) / 5 + spread))


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (0, 9)])
def test_one_seed_or_one_sample_says_nothing(shape: tuple[int, int]) -> None:
    assert crossed_bootstrap(SampleDifferences(np.ones(shape), np.ones(shape[1]))) is None


def test_equal_differences_say_nothing() -> None:
    assert crossed_bootstrap(SampleDifferences(np.full((6, 9), 0.1), np.ones(9))) is None


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_p_values_are_below_the_tail_where_the_interval_ends(confidence: float) -> None:
    found = crossed_bootstrap(drawn(np.random.default_rng(3), 8, 30, (0.1, 0.2, 0.3)))
    assert found is not None
    tail, (low, high) = (1 - confidence) / 2, found.interval(confidence)
    step = 1e-3 * found.error
    assert found.p_above(low - step) <= tail + 2e-3
    assert found.p_above(low + step) >= tail - 2e-3
    assert found.p_below(high + step) <= tail + 2e-3
    assert found.p_below(high - step) >= tail - 2e-3
    assert found.p_below(found.mean) + found.p_above(found.mean) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("discordant", [1, 2, 3])
def test_a_few_samples_that_differ_decide_nothing(discordant: int) -> None:
    """Most resamples draw none of them, and have no spread."""
    values = np.zeros((8, 128))
    values[range(discordant), range(0, 7 * discordant, 7)] = 1
    found = crossed_bootstrap(SampleDifferences(values, np.ones(128)))
    assert found is not None
    low, high = found.interval(0.95)
    assert low < 0 < high
    assert min(found.p_above(0.0), found.p_below(0.0)) > 0.025


def test_samples_that_either_solves_are_told_apart_no_more_often_than_they_should(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Differences of -1, 0 and 1, as in exact match: 0 on average, whatever the sample."""
    monkeypatch.setattr(module, "RESAMPLES", 1000)
    experiments, rng, wrong = 400, np.random.default_rng(4), 0
    for share in (0.01, 0.1):
        for _ in range(experiments // 2):
            values = rng.choice([-1.0, 0.0, 1.0], (8, 40), p=[share / 2, 1 - share, share / 2])
            found = crossed_bootstrap(SampleDifferences(values, np.ones(40)))
            wrong += found is not None and min(found.p_above(0.0), found.p_below(0.0)) < 0.025
    assert wrong <= stats.binom.ppf(0.999, experiments, 0.05)
