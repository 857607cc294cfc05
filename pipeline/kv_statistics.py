"""What KV is like, layer by layer: how long its vectors are, which channels stand out, how many directions it fills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..kvcache.layout import token_features
from .monitor import effective_rank

OUTLIER_RATIO = 6.0
"""LLM.int8() (Dettmers et al., 2022) calls a feature an outlier from a magnitude of 6 on, where most are near 1."""

Kind = Literal["key", "value"]
KINDS: tuple[Kind, Kind] = ("key", "value")


@dataclass(frozen=True)
class LayerStatistics:
    """The keys or the values of one layer. `mean_norm` is that of a head's vector. `outliers` are (head, channel)
    pairs whose standard deviation is more than OUTLIER_RATIO times the median of their layer and kind.
    `effective_rank` is of the covariance of all heads and channels: at most as many as there are."""

    layer: int
    kind: Kind
    mean_norm: float
    outliers: tuple[tuple[int, int], ...]
    effective_rank: float


class KVStatistics:
    """Of one side's KV, streamed over batches of tokens. No token is held."""

    def __init__(self) -> None:
        self._count = 0
        self._heads = 0
        self._norms = torch.zeros(())
        self._sums = torch.zeros(())
        self._products = torch.zeros(())

    @torch.no_grad()
    def update(self, kv: Shaped[Tensor, "L 2 B H T D"], mask: Int[Tensor, "B T"]) -> None:
        """Add the tokens of a batch that the mask names."""
        layers, _, _, self._heads, _, channels = kv.shape
        if self._count == 0:
            features = self._heads * channels
            self._sums = torch.zeros(layers, 2, features, dtype=torch.float64, device=kv.device)
            self._norms = self._sums.new_zeros(layers, 2)
            self._products = self._sums.new_zeros(layers, 2, features, features)
        self._count += int(mask.bool().sum())
        for layer, layer_kv in enumerate(kv):
            rows = token_features(layer_kv, mask).double()
            self._norms[layer] += rows.unflatten(-1, (self._heads, channels)).norm(dim=-1).mean(dim=-1).sum(dim=-1)
            self._sums[layer] += rows.sum(dim=1)
            self._products[layer].baddbmm_(rows.mT, rows)

    def layers(self, numbers: Sequence[int]) -> tuple[LayerStatistics, ...]:
        """Key and value of every layer, under these numbers. Needs a token at least."""
        mean = self._sums / self._count
        covariance = self._products / self._count - mean[..., :, None] * mean[..., None, :]
        return tuple(
            LayerStatistics(
                number,
                kind,
                float(self._norms[layer, column] / self._count),
                self._outliers(covariance[layer, column]),
                effective_rank(covariance[layer, column]),
            )
            for layer, number in enumerate(numbers)
            for column, kind in enumerate(KINDS)
        )

    def _outliers(self, covariance: Float[Tensor, "F F"]) -> tuple[tuple[int, int], ...]:
        std = covariance.diagonal().clamp_min(0).sqrt()
        places = torch.nonzero(std > OUTLIER_RATIO * std.quantile(0.5)).flatten().tolist()
        channels = len(std) // self._heads
        return tuple(divmod(place, channels) for place in places)


def finite_tokens(kv: Shaped[Tensor, "L 2 B H T D"], mask: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], int]:
    """The mask without the tokens that hold NaN or infinity, and how many such numbers there are on the masked."""
    broken = ~kv.isfinite() & mask.bool()[:, None, :, None]
    return mask * ~broken.any(dim=5).any(dim=3).any(dim=1).any(dim=0), int(broken.sum())
