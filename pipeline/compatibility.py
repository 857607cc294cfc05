"""Whether a recipe, its store and its student fit together: asked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..data.sample import Segment
from ..kvcache.errors import ConfigError, StoreError
from ..kvcache.manifest import hash_tokenizer
from ..kvcache.store import KVStore
from .config import DistillConfig
from .models import load_tokenizer, starts_random


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


def require_same_tokenizer(config: DistillConfig, student: PreTrainedModel, num_tokens: int, store: KVStore) -> None:
    """A student must read the very tokens that the teacher read: else StoreError. One that starts at random
    learns them anew."""
    if starts_random(config.student, config.random_init):
        return
    remedy = "Choose a student with the teacher's tokenizer, or start it afresh with --random-init"
    own = hash_tokenizer(load_tokenizer(config.student, option="--student"))
    if own != store.manifest.tokenizer_hash:
        raise StoreError(
            f"{store.path} was extracted with another tokenizer than the student's",
            expected=own[:16],
            found=store.manifest.tokenizer_hash[:16],
            remedy=remedy,
        )
    if (vocabulary := student.get_input_embeddings().num_embeddings) < num_tokens:
        raise StoreError(
            "the student's vocabulary is too small", expected=f"at least {num_tokens}", found=vocabulary, remedy=remedy
        )


def stored_layers(store: KVStore, layer_map: Sequence[int]) -> tuple[int, ...]:
    """Where in a store the teacher's layers of a map are. Raises StoreError naming those that it does not keep."""
    kept = store.manifest.layers
    if missing := sorted(set(layer_map) - set(kept)):
        raise StoreError(
            f"{store.path} lacks layers that the student learns from",
            expected=", ".join(map(str, sorted(set(layer_map)))),
            found=", ".join(map(str, kept)),
            remedy=f"Extract again with --layers ratio:{len(layer_map)}, or all, into a new place (missing: "
            f"{', '.join(map(str, missing))})",
        )
    return tuple(kept.index(layer) for layer in layer_map)


def require_positions(student: PreTrainedModel, store: KVStore) -> None:
    """Raise StoreError for samples longer than the student can read."""
    limit = getattr(student.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = int(store.length.max())
    if limit is not None and longest > limit:
        raise StoreError(
            f"the student cannot read the longest sample of {store.path}",
            expected=f"at most {limit} tokens",
            found=longest,
            remedy="Choose a student with more positions, or extract with fewer --max-tokens",
        )
