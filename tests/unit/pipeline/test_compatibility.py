"""Whether a recipe and its store fit together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kvpipe.kvcache.errors import ConfigError, StoreError
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.compatibility import require_learnable, train_indices
from kvpipe.pipeline.config import DistillConfig

MakeStore = Callable[..., tuple[KVStore, Any]]


def test_a_recipe_uses_the_first_training_samples(make_segmented_store: MakeStore) -> None:
    store, _ = make_segmented_store([5] * 10)
    assert train_indices(store, DistillConfig()).tolist() == [0, 1, 2, 5, 6, 7]
    assert train_indices(store, DistillConfig(samples=4)).tolist() == [0, 1, 2, 5]
    with pytest.raises(ConfigError, match="fewer training samples: expected at most 6, found 7"):
        train_indices(store, DistillConfig(samples=7))


def test_samples_that_are_all_prompt_cannot_be_learned(make_segmented_store: MakeStore) -> None:
    store, _ = make_segmented_store([2, 3, 2, 9], prompt=3)
    require_learnable(store, "train", [0, 3])
    with pytest.raises(StoreError, match=r"the train samples of .* have nothing to learn"):
        require_learnable(store, "train", [0, 1, 2])
