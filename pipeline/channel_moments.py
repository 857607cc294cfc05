"""Mean and standard deviation of every channel, streamed over the tokens of many batches."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Moments = tuple[Float[Tensor, "*L 1 H 1 D"], Float[Tensor, "*L 1 H 1 D"]]
"""Mean and standard deviation, to be broadcast over samples and tokens."""


class ChannelMoments:
    """Sums in float64, of tensors `[..., B, H, T, D]` with a mask `[B, T]` of the tokens that count."""

    def __init__(self) -> None:
        self._count, self._total, self._squares = 0, torch.zeros(()), torch.zeros(())

    def update(self, kv: Shaped[Tensor, "*L B H T D"], mask: Int[Tensor, "B T"]) -> None:
        # Tokens that do not count are zero from here on, so they add nothing to either sum.
        tokens = kv.double() * mask[:, None, :, None]
        self._count += int(mask.sum())
        self._total = self._total + tokens.sum(dim=(-4, -2), keepdim=True)
        self._squares = self._squares + tokens.square().sum(dim=(-4, -2), keepdim=True)

    def value(self) -> Moments:
        mean = self._total / max(1, self._count)
        variance = (self._squares / max(1, self._count) - mean.square()).clamp_min(0)
        return mean.float(), variance.sqrt().float()
