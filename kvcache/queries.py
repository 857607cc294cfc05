"""See the queries of a forward pass, which no cache keeps."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import ModelError
from .layout import take_tokens

RECORDING = "kvpipe_recording"


@contextmanager
def recorded_queries(
    model: PreTrainedModel, places: Int[Tensor, "B W"] | None = None, layers: Collection[int] | None = None
) -> Iterator[dict[int, Float[Tensor, "B Hq W D"]]]:
    """Within the context every forward leaves the queries of some layers, by their numbers, as their attention used
    them, times the attention's scale: at some `places`, by default all. The attention itself is the model's own.

    Raises ModelError for a model whose attention cannot be followed.
    """
    wanted = range(model.config.get_text_config(decoder=True).num_hidden_layers) if layers is None else layers
    own = model.config._attn_implementation
    mask = ALL_MASK_ATTENTION_FUNCTIONS.get(own)
    queries: dict[int, Tensor] = {}

    def record(module: nn.Module, query: Tensor, *rest: Any, scaling: float | None = None, **options: Any) -> Any:
        layer, scale = int(module.layer_idx), query.shape[-1] ** -0.5 if scaling is None else scaling  # type: ignore[arg-type]
        if layer in wanted:
            taken = query if places is None else take_tokens(query, places.to(query.device))
            queries[layer] = taken * scale
        # A model has an eager attention of its own, beside its layers.
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)(module, query, *rest, scaling=scaling, **options)

    AttentionInterface.register(RECORDING, record)
    if mask is not None:
        AttentionMaskInterface.register(RECORDING, mask)
    model.set_attn_implementation(RECORDING)
    try:
        yield queries
    finally:
        model.set_attn_implementation(own)
    if queries.keys() != set(wanted):
        raise ModelError(
            "this model's queries cannot be seen",
            expected=f"the attention of transformers in {len(wanted)} layers",
            found=f"{len(queries)}",
            remedy="Choose what needs none: no --queries, another --evict, another --kv-loss",
        )
