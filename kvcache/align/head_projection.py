"""Maps between two KV spaces: `[L, 2, B, H_in, T, D_in] -> [L, 2, B, H_out, T, D_out]`.

Every layer has its own weights, or all share theirs, and so have key and value. The linear ones apply one matrix
`[H_in * D_in, H_out * D_out]` a layer, and differ in nothing but which matrices they can be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from jaxtyping import Float
from torch import Tensor, nn

from .closed_form import nearest_kronecker

Start = Literal["random", "uniform", "closed-form"]


@dataclass(frozen=True)
class KVSpace:
    """Heads and channels of one side."""

    num_kv_heads: int
    head_dim: int

    @property
    def features(self) -> int:
        return self.num_kv_heads * self.head_dim


class LinearProjection(nn.Module, ABC):
    """One linear map a layer over all heads and channels. `matrix` says what it is made of."""

    def __init__(self, num_layers: int, target: KVSpace) -> None:
        super().__init__()
        self.target = target
        self.bias = nn.Parameter(torch.zeros(num_layers, 2, target.features))

    @abstractmethod
    def matrix(self) -> Float[Tensor, "L 2 F G"]:
        """Rows are the source's (head, channel) pairs, columns the target's."""

    def start_from(self, weight: Float[Tensor, "L 2 F G"], bias: Float[Tensor, "L 2 G"]) -> None:
        """Become the map of this kind that is nearest to a given one, in the least squares of its entries."""
        with torch.no_grad():
            self._start_from(weight.to(self.bias))
            self.bias.copy_(bias)

    @abstractmethod
    def _start_from(self, weight: Float[Tensor, "L 2 F G"]) -> None:
        """Without gradients; the bias is taken care of."""

    def forward(self, kv: Float[Tensor, "L 2 B Hin T Din"]) -> Float[Tensor, "L 2 B Hout T Dout"]:
        rows = _rows(kv)
        weight, bias = (x.expand(kv.shape[0], *x.shape[1:]).flatten(0, 1) for x in (self.matrix(), self.bias))
        return _heads(torch.baddbmm(bias[:, None], rows, weight), kv, self.target)


class FlatProjection(LinearProjection):
    """Any matrix; with a `rank`, any of that rank: the product of two."""

    def __init__(self, num_layers: int, source: KVSpace, target: KVSpace, rank: int | None = None) -> None:
        super().__init__(num_layers, target)
        sizes = [source.features, *([rank] if rank is not None else []), target.features]
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty(num_layers, 2, rows, columns).normal_(std=rows**-0.5))
            for rows, columns in pairwise(sizes)
        )

    def matrix(self) -> Float[Tensor, "L 2 F G"]:
        first, *rest = self.factors
        return first @ rest[0] if rest else first

    def _start_from(self, weight: Float[Tensor, "L 2 F G"]) -> None:
        if len(self.factors) == 1:
            self.factors[0].copy_(weight)
            return
        rank = self.factors[0].shape[-1]
        left, scale, right = torch.linalg.svd(weight, full_matrices=False)
        root = scale[..., :rank].sqrt()
        self.factors[0].zero_()[..., : root.shape[-1]] = left[..., :rank] * root[..., None, :]
        self.factors[1].zero_()[..., : root.shape[-1], :] = root[..., None] * right[..., :rank, :]


class StructuredProjection(LinearProjection):
    """A channel map D_in -> D_out, then a head mixer H_in -> H_out: heads stay heads throughout. With `terms`, a sum of
    so many of them; as a matrix, of Kronecker products.

    With `share_dim_proj` one channel map serves all heads of a layer, else each input head has its own.
    `start="uniform"` starts the mixer at 1 / H_in, the plain mean of the heads, instead of at random.
    """

    def __init__(
        self,
        num_layers: int,
        source: KVSpace,
        target: KVSpace,
        *,
        share_dim_proj: bool = True,
        terms: int = 1,
        start: Start = "random",
    ) -> None:
        super().__init__(num_layers, target)
        self.source = source
        maps = 1 if share_dim_proj else source.num_kv_heads
        self.dim_proj = nn.Parameter(torch.empty(num_layers, 2, terms, maps, source.head_dim, target.head_dim))
        self.head_mixer = nn.Parameter(torch.empty(num_layers, 2, terms, target.num_kv_heads, source.num_kv_heads))
        nn.init.normal_(self.dim_proj, std=(terms * source.head_dim) ** -0.5)
        if start == "uniform":
            nn.init.constant_(self.head_mixer, 1 / source.num_kv_heads)
        else:
            nn.init.normal_(self.head_mixer, std=source.num_kv_heads**-0.5)

    def matrix(self) -> Float[Tensor, "L 2 F G"]:
        maps = self.dim_proj.expand(*self.dim_proj.shape[:3], self.source.num_kv_heads, -1, -1)
        return torch.einsum("lkrgh,lkrhde->lkhdge", self.head_mixer, maps).flatten(4).flatten(2, 3)

    def _start_from(self, weight: Float[Tensor, "L 2 F G"]) -> None:
        heads, terms = self.source.num_kv_heads, self.head_mixer.shape[2]
        if self.dim_proj.shape[3] == 1:
            mixer, maps = nearest_kronecker(weight, heads, self.target.num_kv_heads, terms)
            self.head_mixer.copy_(mixer)
            self.dim_proj.copy_(maps[:, :, :, None])
            return
        # With a map of its own each input head is a problem of its own.
        for head, rows in enumerate(weight.unflatten(2, (heads, -1)).unbind(2)):
            mixer, maps = nearest_kronecker(rows, 1, self.target.num_kv_heads, terms)
            self.head_mixer[..., head].copy_(mixer[..., 0])
            self.dim_proj[:, :, :, head].copy_(maps)


class BottleneckProjection(nn.Module):
    """LayerNorm, then an MLP of one hidden layer of `width` with SiLU, over all heads and channels of a layer."""

    def __init__(self, num_layers: int, source: KVSpace, target: KVSpace, width: int) -> None:
        super().__init__()
        self.target = target
        self.layernorm_weight = nn.Parameter(torch.ones(num_layers, 2, source.features))
        self.layernorm_bias = nn.Parameter(torch.zeros(num_layers, 2, source.features))
        self.down = nn.Parameter(torch.empty(num_layers, 2, source.features, width).normal_(std=source.features**-0.5))
        self.down_bias = nn.Parameter(torch.zeros(num_layers, 2, width))
        self.up = nn.Parameter(torch.empty(num_layers, 2, width, target.features).normal_(std=width**-0.5))
        self.bias = nn.Parameter(torch.zeros(num_layers, 2, target.features))

    def forward(self, kv: Float[Tensor, "L 2 B Hin T Din"]) -> Float[Tensor, "L 2 B Hout T Dout"]:
        rows = _rows(kv)
        normalised = F.layer_norm(rows, rows.shape[-1:])
        normalised = (
            normalised * self.layernorm_weight.flatten(0, 1)[:, None] + self.layernorm_bias.flatten(0, 1)[:, None]
        )
        hidden = F.silu(torch.baddbmm(self.down_bias.flatten(0, 1)[:, None], normalised, self.down.flatten(0, 1)))
        return _heads(torch.baddbmm(self.bias.flatten(0, 1)[:, None], hidden, self.up.flatten(0, 1)), kv, self.target)


def _rows(kv: Float[Tensor, "L 2 B H T D"]) -> Float[Tensor, "L*2 B*T H*D"]:
    """A row of all heads and channels for every token."""
    return kv.transpose(3, 4).flatten(4).flatten(2, 3).flatten(0, 1)


def _heads(
    rows: Float[Tensor, "N M G"], kv: Float[Tensor, "L 2 B H T D"], space: KVSpace
) -> Float[Tensor, "L 2 B Hout T Dout"]:
    """The rows of `_rows(kv)`, mapped into another space, as KV again."""
    layers, kinds, samples, _, tokens, _ = kv.shape
    return rows.view(layers, kinds, samples, tokens, space.num_kv_heads, space.head_dim).transpose(3, 4)
