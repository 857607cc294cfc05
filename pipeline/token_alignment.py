"""Lay a teacher's tokens onto those of a student with another tokenizer, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int
from torch import Tensor

from ..kvcache.align.time_warp import Coverage, SampleMap, TimeMap, equal_spans, segment_map, span_map
from ..kvcache.store import KVStore
from .student_text import StudentText

Reduce = Literal["last", "mean"]


class TokenAlignment:
    """The time maps of a store's samples for one student: by shared characters (`span-last`, `span-mean`), by
    stretching segments (`segment`, as `stretch` does), or `auto`: span-last, and segment where the texts differ."""

    def __init__(
        self, store: KVStore, text: StudentText, time_map: str, stretch: Callable[..., SampleMap] = segment_map
    ) -> None:
        self._store, self._text, self._time_map, self._stretch = store, text, time_map, stretch

    def of(self, indices: Sequence[int], positions: Int[Tensor, "B K"] | None) -> TimeMap:
        """Of a batch. `positions` are those of the teacher's tokens that a store keeps, None where it keeps all."""
        time_map = TimeMap.from_samples([self._sample(int(index)) for index in indices])
        return time_map if positions is None else time_map.restrict(positions)

    def coverage(self, index: int, positions: Int[Tensor, "1 K"] | None) -> Coverage:
        """How many of the student's tokens of one sample have a counterpart. None of those that are stretched pair one
        to one."""
        covered = self.of([index], positions).mask[0].bool().numpy()
        paired = covered & equal_spans(*self._spans(index)) & (not self._stretches(index))
        return Coverage(len(covered), int(covered.sum()), int(paired.sum()))

    def _sample(self, index: int) -> SampleMap:
        if self._stretches(index):
            own, teachers = self._text.segment_ids[index], self._store.segment_ids[index]
            return self._stretch(own[: self._text.length[index]], teachers[: self._store.length[index]])
        reduce: Reduce = "mean" if self._time_map == "span-mean" else "last"
        return span_map(*self._spans(index), reduce)

    def _stretches(self, index: int) -> bool:
        other_text = self._text.other_text is not None and bool(self._text.other_text[index])
        return self._time_map == "segment" or other_text

    def _spans(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        own = self._text.spans if self._text.spans is not None else self._store.spans
        return own[index, : self._text.length[index]], self._store.spans[index, : self._store.length[index]]
