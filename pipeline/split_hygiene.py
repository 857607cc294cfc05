"""What is held out must not be in the training text, not even almost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations

import numpy as np
from scipy.sparse import csr_array

from ..kvcache.errors import ConfigError
from ..kvcache.manifest import hash_json
from ..kvcache.store import KVStore

SHINGLE_WORDS = 3
NEAR_DUPLICATE = 0.8
"""Jaccard similarity of two prompts' shingles, as in Lee et al. 2022 ("Deduplicating training data makes language
models better"), with shorter shingles, for prompts are short."""

CHUNK = 256

Shingle = tuple[str, ...]


def split_hashes(store: KVStore) -> dict[str, str]:
    """What tells two splits of the same name apart: the text of all their samples, in order."""
    return {split: hash_json([store.records[i] for i in store.indices(split)]) for split in store.split_names}


def require_disjoint_splits(store: KVStore) -> None:
    """Raise ConfigError where a prompt of one split is also in another, or a near-duplicate of it is."""
    indices = {split: [int(index) for index in store.indices(split)] for split in store.split_names}
    for other, split in combinations(store.split_names, 2):
        found = [
            (indices[split][a], indices[other][b], similarity)
            for a, b, similarity in near_duplicates(_prompts(store, indices[split]), _prompts(store, indices[other]))
        ]
        if found:
            ours, theirs, similarity = found[0]
            raise ConfigError(
                f"{store.path}: {split} and {other} overlap",
                expected=f"no {split} prompt like one of {other} (Jaccard similarity {NEAR_DUPLICATE} or more)",
                found=f"{len({a for a, _, _ in found})}, the first {store.records[ours]['id']}, "
                f"{similarity:.2f} like {store.records[theirs]['id']}",
                remedy="Leave one of each pair out of the data set, and extract again",
            )


def _prompts(store: KVStore, indices: Sequence[int]) -> list[str]:
    records: list[Mapping[str, str]] = [store.records[index] for index in indices]
    return [record["prompt"] or record["reasoning"] for record in records]


def near_duplicates(texts: Sequence[str], others: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """Pairs of positions whose texts are alike, with their similarity: 1 for texts of the same words."""
    sides = [[_shingles(text) for text in side] for side in (texts, others)]
    vocabulary = {shingle: column for column, shingle in enumerate(dict.fromkeys(chain(*sides[0], *sides[1])))}
    ours, theirs = (_incidence(side, vocabulary) for side in sides)
    sizes, other_sizes = ours.sum(1), theirs.sum(1)
    for start in range(0, len(texts), CHUNK):
        shared = (ours[start : start + CHUNK] @ theirs.T).tocoo()
        rows = shared.row + start
        similarity = shared.data / (sizes[rows] + other_sizes[shared.col] - shared.data)
        for pair in np.flatnonzero(similarity >= NEAR_DUPLICATE):
            yield int(rows[pair]), int(shared.col[pair]), float(similarity[pair])


def _incidence(sides: Sequence[set[Shingle]], vocabulary: Mapping[Shingle, int]) -> csr_array:
    """Which text `[N]` has which shingle `[V]`, as ones."""
    columns = [[vocabulary[shingle] for shingle in shingles] for shingles in sides]
    ends = np.cumsum([0, *map(len, columns)])
    flat = list(chain.from_iterable(columns))
    return csr_array((np.ones(len(flat), np.float32), flat, ends), shape=(len(columns), len(vocabulary)))


def _shingles(text: str) -> set[Shingle]:
    """All runs of words and marks, without regard to case and spacing; a short text is one run."""
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
