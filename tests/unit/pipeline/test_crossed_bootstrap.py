"""The interval over seeds and samples: how often it holds the truth, and what it falls back on."""

from __future__ import annotations

import numpy as np
import pytest
from kvpipe.pipeline import crossed_bootstrap as module
from kvpipe.pipeline.crossed_bootstrap import SampleDifferences, crossed_interval
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


@pytest.mark.parametrize("between", [(0.05, 0.3, 0.5), (0.1, 0.0, 0.3)], ids=["seeds and samples", "seeds"])
def test_the_interval_covers_the_truth_as_often_as_it_says(
    between: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 1000)
    experiments, rng = 2000, np.random.default_rng(0)
    covered = 0
    for _ in range(experiments):
        low, high = crossed_interval(drawn(rng, 8, 40, between), 0.95)
        covered += low <= 0 <= high
    assert 0.935 <= covered / experiments <= 0.965


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
    low, high = crossed_interval(differences, 0.95)
    assert low < mean < high
    assert crossed_interval(differences, 0.95) == (low, high)
    narrower = crossed_interval(differences, 0.9)
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
def test_one_seed_or_one_sample_gives_no_interval(shape: tuple[int, int]) -> None:
    found = crossed_interval(SampleDifferences(np.ones(shape), np.ones(shape[1])), 0.95)
    assert np.isnan(found).all()


def test_equal_differences_have_an_interval_of_no_width() -> None:
    assert crossed_interval(SampleDifferences(np.full((6, 9), 0.5), np.ones(9)), 0.95) == (0.5, 0.5)
