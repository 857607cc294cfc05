"""How much each of several teachers counted, as numbers with names: `fusion_weight_<number>`, in the stores' order."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

COLLAPSED = 0.95
"""The mean weight of one teacher from which on a router has stopped routing."""

_NAME = re.compile(r"fusion_weight_(\d+)")


class MeanWeights:
    """The mean over layers and over tokens that any teacher has, streamed over batches."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def update(self, weights: Float[Tensor, "K L B T"]) -> None:
        sums = weights.detach().sum(dim=(2, 3)).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def metrics(self) -> dict[str, float]:
        """By teacher, and by teacher and layer where layers differ (`fusion_weight_<number>_layer_<layer>`); nothing
        where no teacher that counts has any token."""
        if self._sums is None or not self._sums.any():
            return {}
        by_layer = self._sums / self._sums.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        mean = self._sums.sum(dim=1) / self._sums.sum()
        found = {f"fusion_weight_{number}": weight for number, weight in enumerate(mean.tolist())}
        if (by_layer - by_layer[:, :1]).abs().max() > 1e-6:
            for number, layers in enumerate(by_layer.tolist()):
                found |= {f"fusion_weight_{number}_layer_{layer}": weight for layer, weight in enumerate(layers)}
        return found


def teacher_weights(metrics: Mapping[str, float | None]) -> list[float]:
    """Every teacher's mean weight from a run's metrics, or a line of its log; none of a single teacher."""
    found = {int(match[1]): value for name, value in metrics.items() if (match := _NAME.fullmatch(name))}
    return [float(found[number] or 0.0) for number in sorted(found)]


def layer_weights(metrics: Mapping[str, float | None], number: int) -> list[float]:
    """One teacher's weights by layer, none where all layers have the same."""
    beginning = f"fusion_weight_{number}_layer_"
    return [float(value or 0.0) for name, value in metrics.items() if name.startswith(beginning)]


def is_collapsed(weights: list[float]) -> bool:
    """Whether one of several teachers has all but all of the weight."""
    return max(weights, default=0.0) > COLLAPSED
