"""Which teacher tokens a student token learns from, where the two read different tokens.

The maps of one sample are made in NumPy, for they run in the data loader; `TimeMap` holds those of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from ..layout import take_tokens

Interpolation = Literal["linear", "nearest"]


@dataclass(frozen=True)
class SampleMap:
    """The map of one sample: `index` int64 and `weight` float32, both `[T, K]`, as in `TimeMap`."""

    index: NDArray[np.int64]
    weight: NDArray[np.float32]


@dataclass(frozen=True)
class TimeMap:
    """For every student token K places in the teacher's sequence and their weights: these sum to 1, or are all 0 where
    a token has no counterpart."""

    index: Int[Tensor, "B T K"]
    weight: Float[Tensor, "B T K"]

    @classmethod
    def from_samples(cls, samples: Sequence[SampleMap]) -> TimeMap:
        """The maps of a batch, padded to its longest sample with tokens that have no counterpart."""
        tokens, width = (max(sample.index.shape[axis] for sample in samples) for axis in (0, 1))
        index = np.zeros((len(samples), tokens, width), np.int64)
        weight = np.zeros(index.shape, np.float32)
        for row, sample in enumerate(samples):
            length, own_width = sample.index.shape
            index[row, :length, :own_width] = sample.index
            weight[row, :length, :own_width] = sample.weight
        return cls(torch.from_numpy(index), torch.from_numpy(weight))

    @property
    def mask(self) -> Int[Tensor, "B T"]:
        """1 on tokens that have a counterpart."""
        return (self.weight != 0).any(dim=-1).long()

    def warp(self, kv: Shaped[Tensor, "L 2 B H Tt D"]) -> Shaped[Tensor, "L 2 B H T D"]:
        """The teacher's KV on the student's tokens, 0 where these have no counterpart; in the dtype of `kv`, summed in
        float32 at least. With K = 1 tokens are taken as they are, to the bit."""
        warped = self._weighted(kv, 0)
        for k in range(1, self.index.shape[2]):
            warped = warped + self._weighted(kv, k)
        return warped.to(kv.dtype)

    def _weighted(self, kv: Shaped[Tensor, "L 2 B H Tt D"], k: int) -> Shaped[Tensor, "L 2 B H T D"]:
        weight = self.weight[:, None, :, k : k + 1]
        # Zero times an infinite value is no zero.
        return torch.where(weight == 0, 0, take_tokens(kv, self.index[:, :, k]) * weight)

    def restrict(self, positions: Int[Tensor, "B Kt"]) -> TimeMap:
        """The same map into a teacher's KV of which only the tokens at these positions are kept (sorted, -1 past the
        last). What is gone loses its weight to the others of its row."""
        end = torch.iinfo(torch.int32).max
        # One more than there are, so that every place can be looked at.
        ordered = F.pad(torch.where(positions < 0, end, positions), (0, 1), value=end)
        wanted = self.index.flatten(1).to(ordered.dtype)
        place = torch.searchsorted(ordered, wanted)
        kept = (ordered.gather(1, place) == wanted).view_as(self.index)
        weight = self.weight * kept
        total = weight.sum(dim=-1, keepdim=True)
        return TimeMap(place.view_as(self.index) * kept, weight / torch.where(total > 0, total, 1.0))


def span_map(
    student_spans: NDArray[np.int32], teacher_spans: NDArray[np.int32], reduce: Literal["last", "mean"] = "last"
) -> SampleMap:
    """Tokens of one text by the characters they share: half-open ranges `[T, 2]`, in reading order.

    A student token's counterparts are the teacher's tokens that overlap it. `mean` takes all from the first to
    the last of them. `last` takes the last that ends no later than the student's token: it has read as much of the text
    as can be had without reading on. Where all of them read on, it takes the first, which has read on the least.

    Of n tokens with the same characters (the bytes of one, or special tokens, which are empty) against m with those
    very characters each takes its share in turn, so that equal tokens pair one to one.
    """
    first, last = _overlaps(student_spans, teacher_spans, reduce)
    found = first <= last
    # Byte tokens may reach across characters and so overlap out of turn. A later token never looks further back.
    first = np.maximum.accumulate(np.where(found, first, 0))
    last = np.minimum.accumulate(np.where(found, last, len(teacher_spans))[::-1])[::-1]
    if reduce == "last":
        first = last
    return _ranges(first, last, found)


def _overlaps(
    student: NDArray[np.int32], teacher: NDArray[np.int32], reduce: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last counterpart of every student token; the first after the last where there is none."""
    filled = np.flatnonzero(teacher[:, 0] < teacher[:, 1])
    starts, ends = teacher[filled].T
    first = np.searchsorted(ends, student[:, 0], side="right")
    last = np.searchsorted(starts, student[:, 1], side="left") - 1
    overlaps = (first <= last) & (student[:, 0] < student[:, 1])
    if reduce == "last":
        last = np.maximum(first, np.searchsorted(ends, student[:, 1], side="right") - 1)
    # Only now may empty tokens of the teacher count again.
    places = np.append(filled, len(teacher))
    first, last = np.where(overlaps, places[first], 1), np.where(overlaps, places[np.minimum(last, len(filled))], 0)
    begin, same, rank, twins = _same_span(student, teacher)
    share = np.maximum(rank * same // twins, (rank + 1) * same // twins - 1)
    return np.where(same > 0, begin + rank * same // twins, first), np.where(same > 0, begin + share, last)


def _same_span(student: NDArray[np.int32], teacher: NDArray[np.int32]) -> tuple[NDArray[np.int64], ...]:
    """For every student token the first and the number of the teacher's with its very span, its own rank among the
    student's tokens with that span, and the number of these."""
    own, other = (spans.astype(np.int64) @ np.array([2**32, 1]) for spans in (student, teacher))
    begin, end = np.searchsorted(other, own, side="left"), np.searchsorted(other, own, side="right")
    own_begin, own_end = np.searchsorted(own, own, side="left"), np.searchsorted(own, own, side="right")
    return begin, end - begin, np.arange(len(own)) - own_begin, own_end - own_begin


def _ranges(first: NDArray[np.int64], last: NDArray[np.int64], found: NDArray[np.bool_]) -> SampleMap:
    """The mean from the first to the last place of every token that has any."""
    first, last = np.where(found, first, 0), np.where(found, last, 0)
    width = int((last - first).max(initial=0)) + 1
    places = first[:, None] + np.arange(width)
    weight = (places <= last[:, None]) & found[:, None]
    count = np.maximum(weight.sum(axis=1, keepdims=True), 1)
    return SampleMap(np.minimum(places, last[:, None]), (weight / count).astype(np.float32))


def segment_map(
    student_segments: NDArray[np.int8],
    teacher_segments: NDArray[np.int8],
    *,
    ratio: Mapping[int, float] | None = None,
    interpolation: Interpolation = "linear",
) -> SampleMap:
    """Texts that differ, segment by segment: each student segment is stretched over the teacher's, ends on ends.

    A student's only token of a segment takes the teacher's last, which has read all of it. `ratio` limits a segment, by
    its id, to a first share, above 0 and 1 at most, of the teacher's tokens, at least one. Padding is negative.
    """
    ratio = ratio or {}
    index = np.zeros((len(student_segments), 2 if interpolation == "linear" else 1), np.int64)
    weight = np.zeros(index.shape, np.float32)
    for segment in np.unique(student_segments[student_segments >= 0]).tolist():
        own, other = np.flatnonzero(student_segments == segment), np.flatnonzero(teacher_segments == segment)
        if len(other) == 0:
            continue
        other = other[: max(1, round(len(other) * ratio.get(segment, 1.0)))]
        places, weights = _stretch(len(own), len(other), interpolation)
        index[own], weight[own] = other[places], weights
    return SampleMap(index, weight)


def _stretch(n: int, m: int, interpolation: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Places `[n, K]` among m, and their weights: token i of n lies at i * (m - 1) / (n - 1)."""
    # In whole numbers, so that equal lengths map exactly.
    steps = np.arange(n) * (m - 1) if n > 1 else np.array([m - 1])
    whole, rest = np.divmod(steps, max(n - 1, 1))
    share = rest / max(n - 1, 1)
    if interpolation == "nearest":
        return (whole + (share >= 0.5))[:, None], np.ones((n, 1))
    return np.stack([whole, whole + (rest > 0)], axis=1), np.stack([1 - share, share], axis=1)


@dataclass(frozen=True)
class Coverage:
    """How many student tokens there are, how many of them have a counterpart, and how many pair with one of the very
    same characters. Adds up over samples."""

    tokens: int = 0
    covered: int = 0
    one_to_one: int = 0

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(self.tokens + other.tokens, self.covered + other.covered, self.one_to_one + other.one_to_one)

    @property
    def share(self) -> float:
        """Share of the student's tokens that have a counterpart."""
        return self.covered / max(self.tokens, 1)

    @property
    def one_to_one_share(self) -> float:
        """Share of the student's tokens that pair with one of the very same characters."""
        return self.one_to_one / max(self.tokens, 1)


def equal_spans(student_spans: NDArray[np.int32], teacher_spans: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which student tokens have a counterpart of the very same characters: there are as many of these on both sides."""
    _, same, _, twins = _same_span(student_spans, teacher_spans)
    return same == twins
