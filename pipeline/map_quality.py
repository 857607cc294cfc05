"""How well linear maps between two KVs do on tokens that they were not fitted to: before any training."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..kvcache.align.aligner import Aligner, Mode
from ..kvcache.align.closed_form import GramMoments, Map, centring, head_r2, mean_squared_error, r2, ridge
from ..kvcache.align.head_projection import LinearProjection
from ..kvcache.align.parameter_match import Match, matched_size

MAPS: dict[str, tuple[Mode, Match]] = {
    "flat": ("flat", "none"),
    "structured": ("structured", "none"),
    "structured at flat's size": ("structured", "flat"),
    "flat at structured's size": ("flat", "structured"),
}
"""From the student's KV to the teacher's: the kind, and whose size it has."""

BACKWARD = "teacher to student, flat"


class PairedMoments:
    """Moments of the same tokens for maps from the student's KV to the teacher's, and back."""

    def __init__(self) -> None:
        self.to_teacher, self.to_student = GramMoments(), GramMoments()

    def update(
        self, student: Float[Tensor, "L 2 B Hs T Ds"], target: Shaped[Tensor, "L 2 B Ht T Dt"], mask: Int[Tensor, "B T"]
    ) -> None:
        """Add the tokens of a batch that the mask names. Targets are normalised, as in training."""
        self.to_teacher.update(student, target, mask)
        self.to_student.update(target, student, mask)


@dataclass(frozen=True)
class MapQuality:
    """A kind of map, with as many weights and biases. `r2` `[L, 2, H]` is held-out R2 by layer, key and value, and head
    of its output; `mean_r2` the mean of key and of value."""

    name: str
    parameters: int
    r2: tuple[tuple[tuple[float, ...], ...], ...]
    mean_r2: tuple[float, float]

    @property
    def mean(self) -> float:
        """Of key and value."""
        return sum(self.mean_r2) / 2


@dataclass(frozen=True)
class StartLoss:
    """The KV loss (mse) with which training starts, on held-out tokens and before any step: 1 is what the mean of the
    targets scores."""

    random: float
    closed_form: float


@torch.no_grad()
def compare_maps(aligner: Aligner, fit: PairedMoments, held_out: PairedMoments) -> tuple[MapQuality, ...]:
    """Each of MAPS made of the ridge map, by the nearest matrix that it can be, and the ridge map back. Biases take
    the mean of the fitted inputs to that of their targets."""
    forward, backward = ridge(fit.to_teacher), ridge(fit.to_student)
    moments = fit.to_teacher.covariance()
    found = []
    for name, (mode, match) in MAPS.items():
        projection = _nearest(aligner, mode, match, forward)
        weight = projection.matrix()
        bias = centring(weight, moments)
        size = sum(parameter.numel() for parameter in projection.parameters())
        channels = r2(weight, bias, held_out.to_teacher)
        found.append(_quality(name, size, channels, aligner.config.teacher.num_kv_heads))
    size = sum(part.numel() for part in backward)
    channels = r2(*backward, held_out.to_student)
    return (*found, _quality(BACKWARD, size, channels, aligner.config.student.num_kv_heads))


@torch.no_grad()
def start_loss(aligner: Aligner, fit: PairedMoments, held_out: PairedMoments) -> StartLoss:
    """Of an aligner that starts at random, and of its closed form."""
    projection = deepcopy(aligner.projection).double()
    assert isinstance(projection, LinearProjection)
    random = _loss(projection, held_out.to_teacher)
    projection.start_from(*ridge(fit.to_teacher))
    return StartLoss(random, _loss(projection, held_out.to_teacher))


def _nearest(aligner: Aligner, mode: Mode, match: Match, found: Map) -> LinearProjection:
    config = aligner.config
    size = matched_size(mode, match, config.student, config.teacher, share_dim_proj=config.share_dim_proj)
    projection = Aligner(replace(config, mode=mode, size=size)).projection
    assert isinstance(projection, LinearProjection)
    projection = projection.to(found[0])
    projection.start_from(*found)
    return projection


def _quality(name: str, size: int, channels: Float[Tensor, "L 2 G"], heads: int) -> MapQuality:
    by_head = head_r2(channels, heads)
    key, value = by_head.mean(dim=(0, 2)).tolist()
    return MapQuality(name, size, tuple(tuple(map(tuple, kinds)) for kinds in by_head.tolist()), (key, value))


def _loss(projection: LinearProjection, moments: GramMoments) -> float:
    return float(mean_squared_error(projection.matrix(), projection.bias, moments).mean())
