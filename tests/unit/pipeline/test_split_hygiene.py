"""Near-duplicates against sets of words by hand, and stores that hold text out twice."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from kvpipe.kvcache.errors import ConfigError
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline import split_hygiene as module
from kvpipe.pipeline.split_hygiene import near_duplicates, require_disjoint_splits, split_hashes

MILK = (
    "Tom has 12 bottles of milk and drinks three of them every day. His sister brings him another bottle at the end of "
    "each week. After how many days is there none?"
)
ALIKE = {
    "the very same": MILK,
    "another case": MILK.upper(),
    "other spaces": MILK.replace(" ", "\n  "),
    "one word more": MILK.replace("drinks", "drinks up"),
}
UNLIKE = {
    "other numbers and things": MILK.replace("12", "16").replace("milk", "juice").replace("three", "four"),
    "another story": "Mia finds 20 shells. She gives Ben 7. How many does Mia have?",
    "a part of it": "Tom has 12 bottles of milk",
}


@pytest.mark.parametrize("other", ALIKE)
def test_what_differs_by_a_word_or_by_its_form_is_a_near_duplicate(other: str) -> None:
    ((ours, theirs, similarity),) = near_duplicates([MILK], ["What else?", ALIKE[other]])
    assert (ours, theirs) == (0, 1)
    assert similarity == 1 if other != "one word more" else 0.8 <= similarity < 1


@pytest.mark.parametrize("other", UNLIKE)
def test_another_problem_is_none(other: str) -> None:
    assert list(near_duplicates([MILK], [UNLIKE[other]])) == []


def test_all_pairs_are_found_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sets, one pair at a time."""
    monkeypatch.setattr(module, "CHUNK", 3)
    monkeypatch.setattr(module, "NEAR_DUPLICATE", 0.3)
    rng = random.Random(0)
    sides = [[" ".join(rng.choices("abc", k=rng.randint(1, 9))) for _ in range(20)] for _ in range(2)]

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    expected = {}
    for (i, a), (j, b) in product(enumerate(sides[0]), enumerate(sides[1])):
        similarity = len(runs(a) & runs(b)) / len(runs(a) | runs(b))
        if similarity >= 0.3:
            expected[i, j] = pytest.approx(similarity)
    assert expected
    assert {(i, j): similarity for i, j, similarity in near_duplicates(*sides)} == expected


@pytest.fixture
def store(make_segmented_store: Callable[..., Any]) -> KVStore:
    return make_segmented_store([5, 6, 7, 8, 9, 5, 6, 7, 8, 9])[0]


def with_prompt(store: KVStore, index: int, prompt: str) -> None:
    store.records[index]["prompt"] = prompt


def test_a_store_whose_held_out_text_is_in_training_is_refused(store: KVStore) -> None:
    require_disjoint_splits(store)
    train, test = int(store.indices("train")[1]), int(store.indices("test")[0])
    with_prompt(store, train, MILK)
    with_prompt(store, test, ALIKE["one word more"])
    with pytest.raises(ConfigError, match=rf"test and train overlap: .* the first s/{test}, .* like s/{train}"):
        require_disjoint_splits(store)


def test_what_is_held_out_twice_is_refused_too(store: KVStore) -> None:
    for split in ("validation", "test"):
        with_prompt(store, int(store.indices(split)[0]), MILK)
    with pytest.raises(ConfigError, match="test and validation overlap"):
        require_disjoint_splits(store)


def test_samples_without_a_prompt_are_told_by_their_text(store: KVStore) -> None:
    for split in ("train", "validation"):
        index = int(store.indices(split)[0])
        with_prompt(store, index, "")
        store.records[index]["reasoning"] = MILK
    with pytest.raises(ConfigError, match="validation and train overlap"):
        require_disjoint_splits(store)


def test_a_splits_hash_is_of_its_text_in_order(store: KVStore) -> None:
    before = split_hashes(store)
    assert set(before) == {"train", "validation", "test"}
    with_prompt(store, int(store.indices("test")[0]), MILK)
    after = split_hashes(store)
    assert {name for name in before if before[name] != after[name]} == {"test"}
