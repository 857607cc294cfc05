"""How a model rotates its keys: what its config says, and what it really does to a few tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .capture import CaptureCache
from .errors import ConfigError
from .layout import stack_past_kv
from .rope import Layout, RoPE

PROBED_TOKENS = 8


def rope_parameters(model: PreTrainedModel) -> dict[str, Any]:
    """All that `RoPE.from_parameters` needs, as JSON; empty without RoPE.

    `layout` is found from what the model does to a few tokens, and left out where no rotation of these parameters
    explains the keys of every layer, as in models that rotate in some layers only.
    """
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        # Old architectures rotate without saying how: that is refused by its name where it has to be undone.
        return {"rope_type": config.model_type} if getattr(config, "rotary_dim", None) else {}
    recorded = {**parameters, "max_position_embeddings": getattr(config, "max_position_embeddings", None)}
    layout = _find_layout(model, recorded)
    return json.loads(json.dumps(recorded | ({"layout": layout} if layout else {}), default=str))


def _find_layout(model: PreTrainedModel, parameters: Mapping[str, Any]) -> Layout | None:
    still, turned, positions = _keys_before_and_after(model)
    change = (turned.float() - still.float()).flatten(1).norm(dim=1)
    for layout in get_args(Layout):
        try:
            rope = RoPE.from_parameters({**parameters, "layout": layout}, still.shape[-1])
        except ConfigError:
            return None
        left = rope.remove(turned, positions) - rope.remove(still, torch.zeros_like(positions))
        # A wrong rotation leaves as much as it found, or more; the right one leaves rounding.
        if bool((left.flatten(1).norm(dim=1) < change / 2).all()):
            return layout
    return None


@torch.inference_mode()
def _keys_before_and_after(
    model: PreTrainedModel,
) -> tuple[Float[Tensor, "L B H 1 D"], Float[Tensor, "L B H 1 D"], Int[Tensor, "B 1"]]:
    """Keys of texts of one token, at position 0 and at others, and these.

    A single token attends to itself with weight 1 wherever it stands: rotation is all that the position changes.
    """
    tokens = torch.arange(1, PROBED_TOKENS + 1, device=model.device)[:, None]
    cache = CaptureCache(model.config)
    training = model.training
    model.eval()
    model.base_model(
        input_ids=tokens.repeat(2, 1),
        position_ids=torch.cat([torch.zeros_like(tokens), tokens]),
        past_key_values=cache,
        use_cache=True,
    )
    model.train(training)
    still, turned = stack_past_kv(cache)[:, 0].chunk(2, dim=1)
    return still, turned, tokens
