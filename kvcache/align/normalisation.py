"""Bring the channels of one KV space to one scale, so that a loss weighs them alike."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from .head_projection import KVSpace


class Normalisation(nn.Module):
    """Centres and scales every (layer, key or value, head, channel) by moments that were taken beforehand and stay."""

    mean: Tensor
    std: Tensor

    def __init__(self, num_layers: int, space: KVSpace) -> None:
        super().__init__()
        shape = (num_layers, 2, 1, space.num_kv_heads, 1, space.head_dim)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def set_moments(self, mean: Float[Tensor, "L 2 1 H 1 D"], std: Float[Tensor, "L 2 1 H 1 D"]) -> None:
        self.mean.copy_(mean)
        # A channel that never varies carries nothing: it is centred, not blown up.
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, kv: Shaped[Tensor, "L 2 B H T D"]) -> Float[Tensor, "L 2 B H T D"]:
        return (kv.float() - self.mean) / self.std
