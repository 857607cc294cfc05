"""Several teachers of one student: how much each counts, by layer, sample and token.

Weights are `[K, L, B, T]` for K teachers. On every token they sum to 1 over the teachers that have it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

FusionName = Literal["fixed", "similarity", "learned", "best-of"]
Granularity = Literal["layer", "sample", "token"]
Router = Literal["linear", "mlp"]

HIDDEN = 64
"""Width of an MLP router."""


class Fusion(nn.Module, ABC):
    """`scores` says how much a teacher is worth in logits; what is left is a softmax over those that have a token."""

    @abstractmethod
    def scores(
        self,
        student_kv: Float[Tensor, "L 2 B H T D"],
        predictions: Sequence[Shaped[Tensor, "L 2 B _ T _"]],
        masks: Int[Tensor, "K B T"],
    ) -> Float[Tensor, "K _ _ _"]:
        """Of every teacher, from the student's KV as it is and as each teacher's aligner lays it out for its target;
        axes of layers, samples and tokens are 1 where all of them share a score."""

    def forward(
        self,
        student_kv: Float[Tensor, "L 2 B H T D"],
        predictions: Sequence[Shaped[Tensor, "L 2 B _ T _"]],
        masks: Int[Tensor, "K B T"],
    ) -> Float[Tensor, "K L B T"]:
        """The weights. `masks` are 1 on the tokens that a teacher has; the student learns nothing through them."""
        # Under autocast the router would be rounded to half precision, and its weights with it.
        with torch.autocast(student_kv.device.type, enabled=False):
            scores = self.scores(student_kv.detach().float(), [p.detach().float() for p in predictions], masks)
        return masked_softmax(scores.expand(-1, len(student_kv), *masks.shape[1:]), masks)


class FixedFusion(Fusion):
    """The same weights everywhere; a teacher of none is not learned from."""

    weights: Float[Tensor, " K"]

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights))

    def scores(self, student_kv: Tensor, predictions: Sequence[Tensor], masks: Tensor) -> Tensor:
        return self.weights.log()[:, None, None, None]


class BestOfFusion(Fusion):
    """Every layer learns from one teacher: of those that have a token, the one with the best R2 there."""

    r2: Float[Tensor, "K L"]

    def __init__(self, r2: Float[Tensor, "K L"]) -> None:
        super().__init__()
        self.register_buffer("r2", r2)

    def scores(self, student_kv: Tensor, predictions: Sequence[Tensor], masks: Tensor) -> Tensor:
        found = self.r2[:, :, None, None].where(masks[:, None] != 0, -math.inf)
        best = F.one_hot(found.argmax(dim=0), len(self.r2)).movedim(-1, 0)
        return best.float().log()


class SimilarityFusion(Fusion):
    """The nearer the student's KV comes to what a teacher's looks like, the more that teacher counts.

    A score is minus the squared distance a channel to the nearest of a teacher's prototypes `[L, P, 2 * H * D]`, in
    the space of its target, over `temperature`; its mean over what `per` leaves together.
    """

    def __init__(self, prototypes: Sequence[Float[Tensor, "L P _"]], temperature: float, per: Granularity) -> None:
        super().__init__()
        self.temperature = temperature
        self.per = per
        for number, points in enumerate(prototypes):
            self.register_buffer(f"prototypes_{number}", points)

    def scores(
        self, student_kv: Tensor, predictions: Sequence[Tensor], masks: Int[Tensor, "K B T"]
    ) -> Float[Tensor, "K _ _ _"]:
        distances = torch.stack(
            [
                _nearest(token_rows(prediction), self.get_buffer(f"prototypes_{number}"))
                for number, prediction in enumerate(predictions)
            ]
        )
        return _pooled(-distances / self.temperature, masks, self.per)


class LearnedFusion(Fusion):
    """A router that trains with the student, and starts with equal weights.

    With `per="layer"` it is a weight for every teacher and layer, whatever the input. Else it is a gate, linear or an
    MLP of one hidden layer, that looks at the student's KV of all layers: of a token, or the mean of a sample's.
    """

    def __init__(
        self, num_teachers: int, num_layers: int, features: int, per: Granularity, router: Router = "linear"
    ) -> None:
        super().__init__()
        self.per = per
        if per == "layer":
            self.logits = nn.Parameter(torch.zeros(num_teachers, num_layers))
            return
        last = nn.Linear(features if router == "linear" else HIDDEN, num_teachers)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        hidden = [nn.Linear(features, HIDDEN), nn.SiLU()] if router == "mlp" else []
        self.gate = nn.Sequential(nn.LayerNorm(features, elementwise_affine=False), *hidden, last)

    def scores(
        self, student_kv: Float[Tensor, "L 2 B H T D"], predictions: Sequence[Tensor], masks: Int[Tensor, "K B T"]
    ) -> Float[Tensor, "K _ _ _"]:
        if self.per == "layer":
            return self.logits[:, :, None, None]
        state = token_rows(student_kv).movedim(0, 2).flatten(2)
        if self.per == "sample":
            known = masks.any(dim=0).to(state)[..., None]
            state = (state * known).sum(dim=1, keepdim=True) / known.sum(dim=1, keepdim=True).clamp_min(1)
        return self.gate(state).movedim(-1, 0)[:, None]


def token_rows(kv: Shaped[Tensor, "L 2 B H T D"]) -> Shaped[Tensor, "L B T F"]:
    """Key and value of all heads and channels of a token side by side."""
    return kv.permute(0, 2, 4, 1, 3, 5).flatten(3)


def masked_softmax(scores: Float[Tensor, "K L B T"], masks: Int[Tensor, "K B T"]) -> Float[Tensor, "K L B T"]:
    """Over the teachers that have a token, and 0 where none has it, or none that has it counts."""
    counts = (masks[:, None] != 0) & ~scores.isneginf()
    weights = scores.masked_fill(~counts, torch.finfo(scores.dtype).min).softmax(dim=0)
    return weights * counts


def entropy(weights: Float[Tensor, "K L B T"]) -> Float[Tensor, ""]:
    """Of the weights in nats, in the mean over layers and over tokens that any teacher has."""
    there = weights.sum(dim=0) > 0
    nats = -torch.special.xlogy(weights, weights.clamp_min(torch.finfo(weights.dtype).tiny)).sum(dim=0)
    return (nats * there).sum() / there.sum().clamp_min(1)


def fuse(weights: Float[Tensor, "K L B T"], targets: Sequence[Float[Tensor, "L 2 B H T D"]]) -> Tensor:
    """The weighted mean of targets in one space, `[L, 2, B, H, T, D]`."""
    return sum((w[:, None, :, None, :, None] * kv for w, kv in zip(weights, targets, strict=True)), torch.zeros(()))


def _nearest(rows: Float[Tensor, "L B T F"], points: Float[Tensor, "L P F"]) -> Float[Tensor, "L B T"]:
    """Squared distance a channel to the nearest point."""
    distances = torch.cdist(rows.flatten(1, 2), points).amin(dim=-1).square() / rows.shape[-1]
    return distances.unflatten(1, rows.shape[1:3])


def _pooled(
    scores: Float[Tensor, "K L B T"], masks: Int[Tensor, "K B T"], per: Granularity
) -> Float[Tensor, "K _ _ _"]:
    """The mean over layers and a sample's tokens, over layers, or over all tokens of a batch."""
    if per == "token":
        return scores.mean(dim=1, keepdim=True)
    axes = (2, 3) if per == "layer" else (1, 3)
    known = masks[:, None].to(scores).expand_as(scores)
    return (scores * known).sum(dim=axes, keepdim=True) / known.sum(dim=axes, keepdim=True).clamp_min(1)
