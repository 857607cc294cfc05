"""Linear maps between two KV spaces: `[L, 2, B, H_in, T, D_in] -> [L, 2, B, H_out, T, D_out]`.

Every layer has its own weights, and so have key and value. The two families differ in nothing but the
freedom of the map: `structured` mixes whole heads and whole channels, `flat` every (head, channel) pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class KVSpace:
    """Heads and channels of one side."""

    num_kv_heads: int
    head_dim: int

    @property
    def features(self) -> int:
        return self.num_kv_heads * self.head_dim


class StructuredProjection(nn.Module):
    """A channel map D_in -> D_out, then a head mixer H_in -> H_out. Heads stay heads throughout.

    With `share_dim_proj` one channel map serves all heads of a layer, else each input head has its own.
    `init_uniform` starts the mixer at 1 / H_in, the plain mean of the heads, instead of at random.
    """

    def __init__(
        self, num_layers: int, source: KVSpace, target: KVSpace, *, share_dim_proj: bool, init_uniform: bool
    ) -> None:
        super().__init__()
        maps = 1 if share_dim_proj else source.num_kv_heads
        self.dim_proj = nn.Parameter(torch.empty(num_layers, 2, maps, source.head_dim, target.head_dim))
        self.head_mixer = nn.Parameter(torch.empty(num_layers, 2, target.num_kv_heads, source.num_kv_heads))
        self.bias = nn.Parameter(torch.zeros(num_layers, 2, 1, target.num_kv_heads, 1, target.head_dim))
        nn.init.normal_(self.dim_proj, std=source.head_dim**-0.5)
        if init_uniform:
            nn.init.constant_(self.head_mixer, 1 / source.num_kv_heads)
        else:
            nn.init.normal_(self.head_mixer, std=source.num_kv_heads**-0.5)

    def forward(self, kv: Float[Tensor, "L 2 B Hin T Din"]) -> Float[Tensor, "L 2 B Hout T Dout"]:
        channels = kv @ self.dim_proj[:, :, None]
        mixed = torch.einsum("lkgh,lkbhtd->lkbgtd", self.head_mixer, channels)
        return mixed + self.bias


class FlatProjection(nn.Module):
    """One linear map a layer over all heads and channels at once."""

    def __init__(self, num_layers: int, source: KVSpace, target: KVSpace) -> None:
        super().__init__()
        self.target = target
        self.weight = nn.Parameter(torch.empty(num_layers, 2, source.features, target.features))
        self.bias = nn.Parameter(torch.zeros(num_layers, 2, 1, target.num_kv_heads, 1, target.head_dim))
        nn.init.normal_(self.weight, std=source.features**-0.5)

    def forward(self, kv: Float[Tensor, "L 2 B Hin T Din"]) -> Float[Tensor, "L 2 B Hout T Dout"]:
        flat = kv.transpose(3, 4).flatten(4)
        mapped = flat @ self.weight[:, :, None]
        heads = mapped.unflatten(4, (self.target.num_kv_heads, self.target.head_dim))
        return heads.transpose(3, 4) + self.bias
