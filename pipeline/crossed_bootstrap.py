"""An interval for a paired difference that holds for other seeds and for other held-out samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
CHUNK = 1_000
"""Resamples at a time, which bounds the memory."""


@dataclass(frozen=True)
class SampleDifferences:
    """Arm minus control on every held-out sample, for every seed; a metric is the mean over samples by `weights`."""

    values: Float[np.ndarray, "N M"]
    weights: Float[np.ndarray, " M"]


def crossed_interval(differences: SampleDifferences, confidence: float) -> tuple[float, float]:
    """Bootstrap-t interval of the mean over seeds and samples (Efron & Tibshirani 1993, ch. 12).

    Every seed is evaluated on the same samples, so the two are crossed: seeds and samples are drawn anew, each with
    replacement, and every drawn seed meets every drawn sample (Owen 2007, "The pigeonhole bootstrap"). Studentised,
    for percentiles cover far too little with six or eight seeds. NaN with fewer than two of either.
    """
    values, weights = differences.values, differences.weights
    if min(values.shape) < 2:
        return float("nan"), float("nan")
    once = (np.ones((1, size)) for size in values.shape)
    (mean,), (error,) = _mean_and_error(values, weights, *once)
    if error == 0:
        return float(mean), float(mean)
    rng, studentised = np.random.default_rng(0), []
    for _ in range(RESAMPLES // CHUNK):
        means, errors = _mean_and_error(values, weights, *(_draws(rng, size) for size in values.shape))
        # A resample of one seed over and over has an error of its samples alone, or none at all.
        studentised.append((means - mean) / np.maximum(errors, np.finfo(float).tiny))
    low, high = np.quantile(np.concatenate(studentised), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(mean - high * error), float(mean - low * error)


def _draws(rng: np.random.Generator, size: int) -> Float[np.ndarray, "R K"]:
    """How often each of `size` comes in every resample."""
    return rng.multinomial(size, np.full(size, 1 / size), CHUNK).astype(float)


def _mean_and_error(
    values: Float[np.ndarray, "N M"],
    weights: Float[np.ndarray, " M"],
    seeds: Float[np.ndarray, "R N"],
    samples: Float[np.ndarray, "R M"],
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Weighted mean of every resample, given how often it has each seed and each sample, and its standard error: that
    of the seeds' means and that of the samples' together."""
    num_seeds, num_samples = values.shape
    total = samples @ weights
    of_seeds = (samples * weights) @ values.T / total[:, None]
    mean = (seeds * of_seeds).sum(1) / num_seeds
    of_samples = seeds @ values / num_seeds
    between_seeds = (seeds * (of_seeds - mean[:, None]) ** 2).sum(1) / (num_seeds - 1) / num_seeds
    spread = samples * (weights * (of_samples - mean[:, None])) ** 2
    between_samples = spread.sum(1) / total**2 * num_samples / (num_samples - 1)
    return mean, np.sqrt(between_seeds + between_samples)
