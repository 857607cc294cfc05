"""Linear maps between two feature sets in closed form, from moments that are streamed over batches of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from ..layout import token_features

ClosedForm = Literal["ridge", "procrustes", "pca"]

RIDGE_ALPHA = 1e-3
"""Of the mean variance of a feature: little against any signal, enough where features depend on each other."""

ROUNDING = 1e-12
"""Of a mean square: what sums in float64 may be off by after millions of tokens."""

Map = tuple[Float[Tensor, "L 2 F G"], Float[Tensor, "L 2 G"]]
"""Weight and bias, in float64. Rows and columns are the (head, channel) pairs of either side."""


@dataclass(frozen=True)
class Covariance:
    """Means, covariances of x with itself and with y, and variances of y, of every layer, key and value apart.

    The floors are what rounding alone can make of a variance: what has no more does not vary.
    """

    mean_x: Float[Tensor, "L 2 F"]
    mean_y: Float[Tensor, "L 2 G"]
    xx: Float[Tensor, "L 2 F F"]
    xy: Float[Tensor, "L 2 F G"]
    yy: Float[Tensor, "L 2 G"]
    floor_x: Float[Tensor, "L 2"]
    floor_y: Float[Tensor, "L 2 G"]


class GramMoments:
    """Sums and products of x `[N, F]` and y `[N, G]` over all tokens seen, in float64: F and G are a token's heads and
    channels on either side. No token is held."""

    def __init__(self) -> None:
        self.count = 0
        self._totals: list[Tensor] = []

    @torch.no_grad()
    def update(
        self,
        x: Shaped[Tensor, "L 2 B Hx T Dx"],
        y: Shaped[Tensor, "L 2 B Hy T Dy"],
        mask: Int[Tensor, "B T"],
    ) -> None:
        """Add the tokens of a batch that the mask names: KV of both sides, layers already mapped."""
        self.count += int(mask.bool().sum())
        layers = [_totals(token_features(a, mask), token_features(b, mask)) for a, b in zip(x, y, strict=True)]
        found = [torch.stack(parts) for parts in zip(*layers, strict=True)]
        self._totals = [a.add_(b) for a, b in zip(self._totals, found, strict=True)] if self._totals else found

    def pooled(self) -> GramMoments:
        """The moments of all layers together, as those of one."""
        pooled = GramMoments()
        pooled.count = self.count * len(self._totals[0])
        pooled._totals = [total.sum(dim=0, keepdim=True) for total in self._totals]
        return pooled

    def covariance(self) -> Covariance:
        """All zero where no token was seen."""
        mean_x, mean_y, xx, xy, yy = (total / max(1, self.count) for total in self._totals)
        return Covariance(
            mean_x,
            mean_y,
            xx - mean_x[..., :, None] * mean_x[..., None, :],
            xy - mean_x[..., :, None] * mean_y[..., None, :],
            (yy - mean_y.square()).clamp_min(0),
            ROUNDING * xx.diagonal(dim1=-2, dim2=-1).sum(dim=-1),
            ROUNDING * yy,
        )


def closed_form(method: ClosedForm, moments: GramMoments) -> Map:
    """The map from x to y that a method finds; `pca` takes of y only its size."""
    if method == "ridge":
        return ridge(moments)
    if method == "procrustes":
        return procrustes(moments)
    return pca(moments, moments.covariance().yy.shape[-1])


def ridge(moments: GramMoments, alpha: float = RIDGE_ALPHA) -> Map:
    """Least squares with a penalty of `alpha` times the mean variance of x on squared weights, but not on the bias
    (Hoerl & Kennard, 1970). Without a penalty, of all that fit as well the one of least norm."""
    found = moments.covariance()
    values, directions = torch.linalg.eigh(found.xx)
    penalised = values.clamp_min(0) + alpha * values.mean(dim=-1, keepdim=True).clamp_min(0)
    inverse = torch.where(penalised > found.floor_x[..., None], 1 / penalised, 0)
    weight = directions @ (inverse[..., None] * (directions.mT @ found.xy))
    return weight, centring(weight, found)


def procrustes(moments: GramMoments) -> Map:
    """The semi-orthogonal weight whose output agrees best with y (Schoenemann, 1966): orthonormal rows where x has no
    more features than y, and then the nearest in least squares; else orthonormal columns. Centred, not scaled."""
    found = moments.covariance()
    left, _, right = torch.linalg.svd(found.xy, full_matrices=False)
    weight = left @ right
    return weight, centring(weight, found)


def pca(moments: GramMoments, rank: int) -> Map:
    """The `rank` principal directions of x, largest first; past the features of x all is 0. The output is centred.

    One scale brings its channels to unit variance in the mean, as targets have. Each channel is not: that would
    stretch the directions of least variance, mostly noise, until they weigh as much as the signal.
    """
    found = moments.covariance()
    values, directions = torch.linalg.eigh(found.xx)
    values, directions = values.flip(-1)[..., :rank], directions.flip(-1)[..., :rank]
    # Either sign is an eigenvector: take that whose largest entry is positive.
    largest = directions.gather(-2, directions.abs().argmax(dim=-2, keepdim=True))
    variance = values.sum(dim=-1, keepdim=True) / rank
    scale = torch.where(variance > found.floor_x[..., None], variance, 1).rsqrt()
    weight = found.xx.new_zeros(*found.xx.shape[:-1], rank)
    weight[..., : directions.shape[-1]] = directions * largest.sign() * scale[..., None]
    return weight, -_mapped(found.mean_x, weight)


def r2(weight: Float[Tensor, "L 2 F G"], bias: Float[Tensor, "L 2 G"], moments: GramMoments) -> Float[Tensor, "L 2 G"]:
    """The share of each output's variance that a map explains, on the tokens of the moments, be they those it was
    fitted to or others: 1 at best, 0 for their mean, and below for worse. 0 for outputs that do not vary."""
    found = moments.covariance()
    return torch.where(found.yy > found.floor_y, _explained(weight, bias, found) / found.yy, 0)


def mean_squared_error(
    weight: Float[Tensor, "L 2 F G"], bias: Float[Tensor, "L 2 G"], moments: GramMoments
) -> Float[Tensor, "L 2 G"]:
    """Of a map's outputs on the tokens of the moments."""
    found = moments.covariance()
    return found.yy - _explained(weight, bias, found)


def _explained(
    weight: Float[Tensor, "L 2 F G"], bias: Float[Tensor, "L 2 G"], found: Covariance
) -> Float[Tensor, "L 2 G"]:
    """By how much a map's mean squared error is less than the variance of y."""
    weight = weight.double()
    offset = found.mean_y - _mapped(found.mean_x, weight) - bias
    return 2 * (weight * found.xy).sum(dim=-2) - (weight * (found.xx @ weight)).sum(dim=-2) - offset.square()


def head_r2(channels: Float[Tensor, "L 2 G"], num_heads: int) -> Float[Tensor, "L 2 H"]:
    """The mean of `r2` over the channels of every head."""
    return channels.unflatten(-1, (num_heads, -1)).mean(dim=-1)


def nearest_kronecker(
    weight: Float[Tensor, "L 2 F G"], source_heads: int, target_heads: int, terms: int
) -> tuple[Float[Tensor, "L 2 R Hout Hin"], Float[Tensor, "L 2 R Din Dout"]]:
    """Head mixers and channel maps whose Kronecker products sum to the matrix nearest to `weight` in the least squares
    of its entries (Van Loan & Pitsianis, 1993). Rows and columns of `weight` are (head, channel) pairs.

    The larger terms come first, both factors of a term equally large. Terms beyond those it takes are 0.
    """
    blocks = weight.unflatten(3, (target_heads, -1)).unflatten(2, (source_heads, -1))
    # Every Kronecker product of a mixer and a map is one outer product here.
    rows = blocks.permute(0, 1, 4, 2, 3, 5)
    left, scale, right = torch.linalg.svd(rows.flatten(4).flatten(2, 3), full_matrices=False)
    root = scale[..., :terms].sqrt()[..., None]
    mixers, maps = left.mT[..., :terms, :] * root, right[..., :terms, :] * root
    missing = (0, 0, 0, terms - root.shape[-2])
    return (
        pad(mixers, missing).unflatten(-1, rows.shape[2:4]),
        pad(maps, missing).unflatten(-1, rows.shape[4:]),
    )


def _totals(x: Shaped[Tensor, "2 N F"], y: Shaped[Tensor, "2 N G"]) -> list[Tensor]:
    """Sums of x and y, products of x with itself and with y, squares of y."""
    x, y = x.double(), y.double()
    return [x.sum(dim=1), y.sum(dim=1), x.mT @ x, x.mT @ y, y.square().sum(dim=1)]


def _mapped(mean: Float[Tensor, "L 2 F"], weight: Float[Tensor, "L 2 F G"]) -> Float[Tensor, "L 2 G"]:
    return (mean[..., None, :] @ weight).squeeze(-2)


def centring(weight: Float[Tensor, "L 2 F G"], found: Covariance) -> Float[Tensor, "L 2 G"]:
    """The bias that takes the mean of x to that of y."""
    return found.mean_y - _mapped(found.mean_x, weight)
