"""Whether a recipe, its store and its student fit together: asked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.sample import Segment
from ..kvcache.align.layer_map import LayerMap, layer_map
from ..kvcache.errors import ConfigError, ModelError, StoreError
from ..kvcache.manifest import hash_tokenizer
from ..kvcache.store import KVStore
from .config import DistillConfig
from .models import load_tokenizer, starts_random, tokenizer_from_files
from .student_text import StudentText, own_tokens, teachers_tokens


def train_indices(store: KVStore, config: DistillConfig) -> NDArray[np.int64]:
    """Positions of the training samples that a recipe uses. Raises ConfigError where the store has fewer."""
    train = store.indices("train")
    if config.samples is not None and config.samples > len(train):
        raise ConfigError(
            "the store has fewer training samples",
            expected=f"at most {len(train)}",
            found=config.samples,
            remedy="Lower --samples, or extract more",
        )
    return train[: config.samples]


def require_learnable(store: KVStore, split: str, indices: Sequence[int] | NDArray[np.int64]) -> None:
    """Raise StoreError where every sample was excluded, and for samples that are all prompt, as short --max-tokens
    leave them: no token has a loss."""
    if len(indices) == 0:
        raise StoreError(
            f"{store.path} has no {split} samples",
            expected="at least 1",
            found=f"{len(store.excluded)} samples excluded, whose KV is not finite or evicted",
            remedy="Extract again with a --dtype of more range, or more --segments",
        )
    if not (store.segment_ids[np.asarray(indices)] > Segment.PROMPT).any():
        raise StoreError(
            f"the {split} samples of {store.path} have nothing to learn",
            expected="tokens of reasoning or answers",
            found=f"prompts only, cut at {store.manifest.max_tokens} tokens",
            remedy="Extract again with more --max-tokens, or from samples with answers",
        )


def student_text(
    config: DistillConfig, store: KVStore, student: PreTrainedModel
) -> tuple[StudentText, PreTrainedTokenizerBase]:
    """How the student reads the store's samples, and the tokenizer that it goes on with: the teacher's, where it starts
    at random or has the same one; else its own. Raises ModelError where its vocabulary is smaller than its tokenizer's.
    """
    if starts_random(config.student, config.random_init):
        return teachers_tokens(store), tokenizer_from_files(store.tokenizer_files())
    tokenizer = load_tokenizer(config.student, option="--student")
    if (vocabulary := student.get_input_embeddings().num_embeddings) < len(tokenizer):
        raise ModelError(
            "the student's vocabulary is smaller than its tokenizer's",
            expected=f"at least {len(tokenizer)}",
            found=vocabulary,
            remedy="Put the model's own tokenizer beside it, or start it afresh with --random-init",
        )
    same = hash_tokenizer(tokenizer) == store.manifest.tokenizer_hash
    return (teachers_tokens(store) if same else own_tokens(store, tokenizer)), tokenizer


def require_layers(store: KVStore, layer_map: LayerMap) -> LayerMap:
    """A map over all the teacher's layers as one over those that a store keeps. Raises StoreError naming those that it
    does not."""
    kept, used = store.manifest.layers, layer_map.used
    if missing := sorted(set(used) - set(kept)):
        raise StoreError(
            f"{store.path} lacks layers that the student learns from",
            expected=", ".join(map(str, used)),
            found=", ".join(map(str, kept)),
            remedy=f"Extract again with --layers {','.join(map(str, used))}, or all, into a new place "
            f"(missing: {', '.join(map(str, missing))})",
        )
    return layer_map.restrict(kept)


def stored_layer_map(name: str, num_student_layers: int, store: KVStore) -> LayerMap:
    """The map of a name, for a student of so many layers, over those that a store keeps. Raises what `layer_map` and
    `require_layers` raise."""
    return require_layers(store, layer_map(name, num_student_layers, store.manifest.teacher.num_layers))


def require_positions(student: PreTrainedModel, store: KVStore, text: StudentText) -> None:
    """Raise StoreError for samples longer than the student can read."""
    limit = getattr(student.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = int(text.length.max())
    if limit is not None and longest > limit:
        raise StoreError(
            f"the student cannot read the longest sample of {store.path}",
            expected=f"at most {limit} tokens",
            found=longest,
            remedy="Choose a student with more positions, or extract with fewer --max-tokens",
        )


def require_queries(store: KVStore, kv_loss: str, time_map: str, layer_map: LayerMap) -> None:
    """Raise StoreError for a loss that needs the teacher's queries where they are not stored, ConfigError where the
    student's tokens have none, or its layers learn from several at once."""
    if not store.manifest.queries:
        raise StoreError(
            f"--kv-loss {kv_loss} compares attention, and {store.path} has no queries",
            expected="a store with queries",
            found="keys and values only",
            remedy="Extract again with --queries, or choose another --kv-loss",
        )
    if time_map != "identity":
        raise ConfigError(
            f"--kv-loss {kv_loss} compares attention token by token",
            expected="a student with the teacher's tokenizer",
            found=f"--time-map {time_map}",
            remedy="Choose another --kv-loss",
        )
    if layer_map.one_to_one is None:
        raise ConfigError(
            f"--kv-loss {kv_loss} compares attention layer by layer",
            expected="a layer map from each student layer to one teacher layer",
            found="means of several",
            remedy="Choose --layer-map ratio, skip or last, or another --kv-loss",
        )
