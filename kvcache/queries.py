"""See the queries of a forward pass, which no cache keeps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
def recorded_queries(model: PreTrainedModel, places: Int[Tensor, "B W"]) -> Iterator[list[Float[Tensor, "B Hq W D"]]]:
    """Within the context every forward leaves the queries at some places of every layer, as its attention used them,
    times the attention's scale. The attention itself is the model's own.

    Raises ModelError for a model whose attention cannot be followed.
    """
    own = model.config._attn_implementation
    queries: list[Tensor] = []

    def record(module: nn.Module, query: Tensor, *rest: Any, scaling: float | None = None, **options: Any) -> Any:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        queries.append(take_tokens(query, places.to(query.device)) * scale)
        # A model has an eager attention of its own, beside its layers.
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)(module, query, *rest, scaling=scaling, **options)

    AttentionInterface.register(RECORDING, record)
    AttentionMaskInterface.register(RECORDING, ALL_MASK_ATTENTION_FUNCTIONS[own])
    model.set_attn_implementation(RECORDING)
    try:
        yield queries
    finally:
        model.set_attn_implementation(own)
    if not queries:
        raise ModelError(
            "this model's queries cannot be seen",
            expected="the attention of transformers",
            found="one of its own",
            remedy="Choose another --evict",
        )
