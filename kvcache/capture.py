"""Take the KV a model computes anyway: a Cache that keeps references instead of concatenating copies."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .errors import ModelError

CAPTURABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class _CaptureLayer(CacheLayerMixin):
    """One layer's key and value `[B, H, T, D]`, as the attention of this very forward uses them."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class CaptureCache(Cache):
    """Hand it to one forward as `past_key_values`; afterwards `layers[i].keys` and `.values` are that
    forward's own tensors `[B, H, T, D]`.

    Nothing is copied and autograd is untouched, so a loss on the captured tensors trains the model.
    Sliding-window layers keep every token. For a single forward over whole sequences, not for generation.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        check_capturable(config)
        super().__init__(layer_class_to_replicate=_CaptureLayer)
        self._expected_layers = config.get_text_config(decoder=True).num_hidden_layers

    def check_complete(self) -> None:
        """Raise ModelError unless every layer of the model has left its key and value here."""
        found = sum(layer.keys is not None for layer in self.layers)
        if found != self._expected_layers:
            raise ModelError(
                "the forward pass left an incomplete KV cache",
                expected=f"{self._expected_layers} layers",
                found=f"{found}",
                remedy="Turn gradient checkpointing off; models whose layers share KV are not supported",
            )


def check_capturable(config: PreTrainedConfig) -> None:
    """Raise ModelError, naming the layer types, for a model with layers that have no plain KV cache."""
    text_config = config.get_text_config(decoder=True)
    layer_types = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    unsupported = sorted(layer_types - CAPTURABLE_LAYERS)
    if getattr(text_config, "num_kv_shared_layers", 0):
        unsupported.append("shared-KV layers")
    if getattr(text_config, "kv_lora_rank", None):
        unsupported.append("latent attention (MLA)")
    if unsupported:
        raise ModelError(
            f"{config.model_type} has layers without a plain KV cache",
            expected=" or ".join(sorted(CAPTURABLE_LAYERS)),
            found=", ".join(unsupported),
            remedy="Choose a model whose layers all keep keys and values of one shape",
        )
