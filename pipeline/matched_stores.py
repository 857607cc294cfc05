"""Several stores over the same prompts: which of their samples belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..data.sample import Segment
from ..kvcache.errors import StoreError
from ..kvcache.store import KVStore
from .student_text import StudentText

Key = tuple[str, int]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class MatchedStore:
    """A store by the samples of the first one: `rows[i]` is where the first one's sample i lies in it, -1 where it has
    none. `text` is what the student reads, in the order of this store; samples that are not the student's are empty."""

    store: KVStore
    rows: NDArray[np.int64]
    text: StudentText

    def of(self, indices: Sequence[int]) -> list[int]:
        """Where the first store's samples at `indices` lie in this one, without those that it lacks."""
        rows = self.rows[np.asarray(indices)]
        return [int(row) for row in rows[rows >= 0]]


def match_stores(stores: Sequence[KVStore], text: StudentText) -> list[MatchedStore]:
    """All stores by the samples of the first, which are those that the student reads as `text`.

    Samples belong together by their id; their prompts are the same. Raises StoreError where they are not, where a store
    has none of the first one's samples, and for one store twice.
    """
    first = stores[0]
    if len(stores) == 1:
        return [MatchedStore(first, np.arange(first.num_samples), text)]
    _require_different(stores)
    return [_matched(first, store, text) for store in stores]


def common_samples(stores: Sequence[MatchedStore], indices: Sequence[int]) -> int:
    """How many of the first store's samples at `indices` all stores have."""
    rows = np.stack([matched.rows[np.asarray(indices)] for matched in stores])
    return int((rows >= 0).all(axis=0).sum())


def _require_different(stores: Sequence[KVStore]) -> None:
    twice = [path for path, count in Counter(store.path.resolve() for store in stores).items() if count > 1]
    if twice:
        raise StoreError(
            "one store is named twice",
            expected="a store for every teacher",
            found=f"{twice[0]} again",
            remedy="Name each --store once; --fusion-weights says how much one counts",
        )


def _matched(first: KVStore, store: KVStore, text: StudentText) -> MatchedStore:
    usable = np.ones(store.num_samples, bool)
    usable[store.excluded] = False
    places = {key: row for row, key in enumerate(_keys(store)) if usable[row]}
    rows = np.array([places.get(key, -1) for key in _keys(first)], np.int64)
    found = np.flatnonzero(rows >= 0)
    _require_same_prompts(first, store, rows, found)
    own = _reordered(text, found, rows[found], store.num_samples)
    if not _same_tokens(own, store, rows[found]):
        spans = text.spans if text.spans is not None else first.spans
        own = replace(own, spans=_placed(spans, found, rows[found], store.num_samples))
    other = np.zeros(store.num_samples, bool)
    other[rows[found]] = [_wording(first, int(i)) != _wording(store, int(rows[i])) for i in found]
    return MatchedStore(store, rows, replace(own, other_text=other))


def _keys(store: KVStore) -> Iterator[Key]:
    """Ids, and which of those with that id a sample is: nothing keeps a data set from using one twice."""
    seen: Counter[str] = Counter()
    for record in store.records:
        yield record["id"], seen[record["id"]]
        seen[record["id"]] += 1


def _wording(store: KVStore, index: int) -> tuple[str, ...]:
    return tuple(store.records[index][segment] for segment in ("prompt", "reasoning", "answer"))


def _prompt(store: KVStore, index: int) -> str:
    """Of plain text the text."""
    prompt, reasoning, _ = _wording(store, index)
    return prompt or reasoning


def _require_same_prompts(first: KVStore, store: KVStore, rows: NDArray[np.int64], found: NDArray[np.int64]) -> None:
    differing = [int(i) for i in found if _prompt(first, int(i)) != _prompt(store, int(rows[i]))]
    if differing or not len(found):
        example = f"the first {first.records[differing[0]]['id']}" if differing else ""
        raise StoreError(
            f"{first.path} and {store.path} are not over the same prompts",
            expected="samples of the same ids with the same prompts",
            found=f"{len(differing)} of {len(found)} common ids with another prompt, {example}"
            if example
            else "no common id",
            remedy="Extract all teachers from the same --dataset, --samples and --seed",
        )


def _same_tokens(own: StudentText, store: KVStore, rows: NDArray[np.int64]) -> bool:
    """Whether the student reads, token by token, what the teacher did, whose KV is all there."""
    if own.spans is not None or store.evicts or (own.length[rows] != store.length[rows]).any():
        return False
    width = int(store.length[rows].max())
    return bool((own.input_ids[rows, :width] == store.input_ids[rows, :width]).all())


def _reordered(text: StudentText, found: NDArray[np.int64], rows: NDArray[np.int64], samples: int) -> StudentText:
    return StudentText(
        _placed(text.input_ids, found, rows, samples),
        _placed(text.segment_ids, found, rows, samples, Segment.PADDING),
        _placed(text.length, found, rows, samples),
        None if text.spans is None else _placed(text.spans, found, rows, samples),
    )


def _placed(
    values: NDArray[T], found: NDArray[np.int64], rows: NDArray[np.int64], samples: int, padding: int = 0
) -> NDArray[T]:
    """The values of the samples that were found, each at its row."""
    placed = np.full((samples, *values.shape[1:]), padding, values.dtype)
    placed[rows] = values[found]
    return placed
