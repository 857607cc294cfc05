"""Whether a recipe and its store fit together."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvpipe.kvcache.align.layer_map import LayerMap, layer_map
from kvpipe.kvcache.errors import ConfigError, ModelError, StoreError
from kvpipe.kvcache.manifest import hash_tokenizer
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.compatibility import (
    require_layers,
    require_learnable,
    require_positions,
    require_queries,
    student_text,
    train_indices,
)
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.student_text import teachers_tokens
from transformers import PreTrainedModel, PreTrainedTokenizerFast

MakeStore = Callable[..., tuple[KVStore, Any]]
MakeModel = Callable[..., PreTrainedModel]


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


# ---------------------------------------------------------------------- layers


@pytest.fixture
def odd_layers(make_segmented_store: MakeStore) -> KVStore:
    """Layers 1, 3 and 5 of a teacher of six."""
    store, _ = make_segmented_store([5, 9], layers=3)
    teacher = replace(store.manifest.teacher, num_layers=6)
    store.manifest = replace(store.manifest, layers=(1, 3, 5), teacher=teacher)
    return store


def test_a_map_of_the_teachers_layers_becomes_one_of_those_that_are_kept(odd_layers: KVStore) -> None:
    assert require_layers(odd_layers, layer_map("ratio", 3, 6)) == LayerMap.identity(3)
    mixed = LayerMap(((0.0, 0.25, 0.0, 0.75, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0, 0.0, 1.0)))
    assert require_layers(odd_layers, mixed) == LayerMap(((0.25, 0.75, 0.0), (0.0, 0.0, 1.0)))


def test_layers_that_are_learned_from_and_not_kept_are_named(odd_layers: KVStore) -> None:
    with pytest.raises(StoreError) as refused:
        require_layers(odd_layers, LayerMap.one_hot([0, 3, 4, 5], 6))
    assert "lacks layers that the student learns from: expected 0, 3, 4, 5, found 1, 3, 5" in str(refused.value)
    assert "Extract again with --layers 0,3,4,5, or all, into a new place (missing: 0, 4)" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize("limit", [8, 11, 12, 20])
def test_a_student_reads_samples_as_long_as_its_positions(
    make_segmented_store: MakeStore, make_model: MakeModel, limit: int
) -> None:
    store, _ = make_segmented_store([5, 12, 9])
    refusal = None
    try:
        require_positions(make_model(max_position_embeddings=limit), store, teachers_tokens(store))
    except StoreError as error:
        refusal = str(error)
    assert (refusal is None) == (limit >= 12)
    assert refusal is None or re.search(
        rf"the longest sample of .*: expected at most {limit} tokens, found 12", refusal
    )


def test_its_own_tokens_are_what_must_fit(make_segmented_store: MakeStore, make_model: MakeModel) -> None:
    """Of the same text a student may read more tokens than the teacher, or fewer."""
    store, _ = make_segmented_store([5, 12, 9])
    for lengths, fits in (([4, 8, 6], True), ([9, 25, 20], False)):
        text = replace(teachers_tokens(store), length=np.array(lengths, np.int32))
        if fits:
            require_positions(make_model(max_position_embeddings=8), store, text)
            continue
        with pytest.raises(StoreError, match="expected at most 24 tokens, found 25"):
            require_positions(make_model(max_position_embeddings=24), store, text)


# ---------------------------------------------------------------------- queries


def test_a_store_without_queries_names_the_option_that_writes_them(make_store: MakeStore) -> None:
    """One that has them serves."""
    require_queries(make_store([5, 9], query_heads=4)[0], "structural", "identity", LayerMap.identity(2))
    store, _ = make_store([5, 9])
    with pytest.raises(StoreError, match=r"--kv-loss structural compares attention.*Extract again with --queries"):
        require_queries(store, "structural", "identity", LayerMap.identity(2))


@pytest.mark.parametrize("time_map", ["span-last", "span-mean", "segment"])
def test_attention_has_no_counterpart_in_other_tokens(make_store: MakeStore, time_map: str) -> None:
    store, _ = make_store([5, 9], query_heads=4)
    with pytest.raises(
        ConfigError, match=rf"expected a student with the teacher's tokenizer, found --time-map {time_map}"
    ):
        require_queries(store, "attention-mse", time_map, LayerMap.identity(2))


def test_a_mean_of_layers_attends_to_nothing(make_store: MakeStore) -> None:
    store, _ = make_store([5, 9], query_heads=4)
    require_queries(store, "structural", "identity", layer_map("last", 3, 2))
    with pytest.raises(ConfigError, match=r"layer by layer: .* found means of several\. Choose --layer-map ratio"):
        require_queries(store, "structural", "identity", layer_map("uniform", 1, 2))


# ---------------------------------------------------------------------- tokens


@pytest.fixture
def trained(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[[int], str]:
    """`trained(40)`: the folder of a student with weights, so large a vocabulary, and a tokenizer of 40 words."""

    def save(vocabulary: int) -> str:
        make_model(vocab_size=vocabulary).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def test_a_student_that_starts_at_random_takes_the_teachers_tokens(
    make_store: MakeStore, make_model: MakeModel, trained: Callable[[int], str]
) -> None:
    folder = trained(40)
    files = {path.name: path.read_bytes() for path in Path(folder).glob("tokenizer*")}
    store, _ = make_store([5, 9], tokenizer_files=files)
    for recipe in (DistillConfig(student="tiny"), DistillConfig(student=folder, random_init=True)):
        text, tokenizer = student_text(recipe, store, make_model())
        assert text.spans is None
        assert len(tokenizer) == 40


def test_a_trained_student_with_the_teachers_tokenizer_reads_as_the_teacher_did(
    make_store: MakeStore, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, trained: Callable[[int], str]
) -> None:
    store, _ = make_store([5, 9])
    recipe = DistillConfig(student=trained(40))
    assert student_text(recipe, store, make_model())[0].spans is not None
    store.manifest = replace(store.manifest, tokenizer_hash=hash_tokenizer(tokenizer))
    assert student_text(recipe, store, make_model())[0].spans is None


def test_a_vocabulary_that_is_smaller_than_its_tokenizers_is_refused(
    make_store: MakeStore, make_model: MakeModel, trained: Callable[[int], str]
) -> None:
    store, _ = make_store([5, 9])
    recipe = DistillConfig(student=trained(39))
    with pytest.raises(ModelError, match="smaller than its tokenizer's: expected at least 40, found 39"):
        student_text(recipe, store, make_model(vocab_size=39))
    assert student_text(DistillConfig(student=trained(64)), store, make_model(vocab_size=64))[1].vocab_size == 40
