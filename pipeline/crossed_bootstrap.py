"""Whether a paired difference holds for other seeds and for other held-out samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int

RESAMPLES = 10_000
CHUNK = 1_000
"""Resamples at a time, which bounds the memory."""

ROUNDING = 1e-12
"""An error below this share of the largest difference is float64's."""


@dataclass(frozen=True)
class SampleDifferences:
    """Arm minus control on every held-out sample, for every seed; a metric is the mean over samples by `weights`."""

    values: Float[np.ndarray, "N M"]
    weights: Float[np.ndarray, " M"]


@dataclass(frozen=True)
class CrossedBootstrap:
    """A mean over seeds and samples, its standard error, and how many errors it lay off in every resample.

    Where `unknown`, a resample has no spread to measure by, as when few samples differ at all and it drew none of them.
    It counts as far out on either side, so that such data decide nothing.
    """

    mean: float
    error: float
    studentised: Float[np.ndarray, " R"]
    unknown: Bool[np.ndarray, " R"]

    def interval(self, confidence: float) -> tuple[float, float]:
        """Bootstrap-t interval (Efron & Tibshirani 1993, ch. 12); an end is infinite where resamples do not tell."""
        tail = (1 - confidence) / 2
        low = np.quantile(np.where(self.unknown, -np.inf, self.studentised), tail, method="inverted_cdf")
        high = np.quantile(np.where(self.unknown, np.inf, self.studentised), 1 - tail, method="inverted_cdf")
        return self.mean - float(high) * self.error, self.mean - float(low) * self.error

    def p_below(self, value: float) -> float:
        """One-sided p: small where the true mean lies below `value`."""
        return self._share(self.studentised <= (self.mean - value) / self.error)

    def p_above(self, value: float) -> float:
        """One-sided p: small where the true mean lies above `value`."""
        return self._share(self.studentised >= (self.mean - value) / self.error)

    def _share(self, as_far_out: Bool[np.ndarray, " R"]) -> float:
        """The data themselves are one more resample, so that no p is 0."""
        return (1 + int((as_far_out | self.unknown).sum())) / (1 + len(as_far_out))


def crossed_bootstrap(differences: SampleDifferences) -> CrossedBootstrap | None:
    """Every seed is evaluated on the same samples, so the two are crossed: seeds and samples are drawn anew, each with
    replacement, and every drawn seed meets every drawn sample (Owen 2007, "The pigeonhole bootstrap"). Studentised,
    for percentiles cover far too little with six or eight seeds. None with fewer than two of either, or no spread.
    """
    values, weights = differences.values, differences.weights
    if min(values.shape) < 2:
        return None
    least = ROUNDING * float(np.abs(values).max())
    (mean,), (error,) = _mean_and_error(values, weights, *(np.ones((1, size)) for size in values.shape))
    if error <= least:
        return None
    drawn = [
        _mean_and_error(values, weights, *(counts.astype(float) for counts in resamples))
        for resamples in _resamples(values.shape, RESAMPLES // CHUNK)
    ]
    means, errors = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    return CrossedBootstrap(float(mean), float(error), (means - mean) / np.maximum(errors, least), errors <= least)


@lru_cache(maxsize=1)
def _resamples(shape: tuple[int, int], chunks: int) -> list[tuple[Int[np.ndarray, "R N"], Int[np.ndarray, "R M"]]]:
    """How often each seed and each sample comes in every resample. Comparisons of one shape share them: to draw them
    takes longer than to compute with them."""
    rng = np.random.default_rng(0)
    num_seeds, num_samples = shape
    return [(_counts(rng, num_seeds), _counts(rng, num_samples)) for _ in range(chunks)]


def _counts(rng: np.random.Generator, size: int) -> Int[np.ndarray, "R K"]:
    return rng.multinomial(size, np.full(size, 1 / size), CHUNK).astype(np.int16)


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
