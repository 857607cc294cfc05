"""How KV is kept on disk: as it is, or in fewer bits with scales beside it.

All codecs but `raw` group keys by channel, over the tokens of a block, and values by token, over the channels of a
head: keys have channels that stand out, values do not (KIVI, arXiv:2402.02750). Scales are float16.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from .errors import ConfigError
from .layout import DIMENSION_NAMES, STORAGE_DTYPES, KVGeometry
from .part import KV_POSITION, QUERIES, Part, positions_part, queries_part

Chunks = Shaped[Tensor, "N L 2 H block D"]
"""Token blocks of any samples, one after the other."""

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of so many bytes."""

HALF_ULP = 2.0**-11
"""Of float16, relative: what rounding to it changes at most."""


class Codec(ABC):
    """KV chunks in the model's dtype <-> the arrays of a store, `kv` first."""

    name: str
    lossy = True

    @abstractmethod
    def packed(self, head_dim: int) -> int:
        """Items that the channels of a head take in `kv`."""

    @abstractmethod
    def head_dim(self, packed: int) -> int:
        """The inverse of `packed`."""

    @abstractmethod
    def parts(self, geometry: KVGeometry, block: int) -> dict[str, Part]:
        """The arrays, by name, for blocks of so many tokens."""

    def all_parts(self, geometry: KVGeometry, block: int, *, evicts: bool) -> dict[str, Part]:
        """The arrays of a store: those of the KV, then, if tokens are evicted, that of the places of the rest, then, if
        the geometry has any, that of the queries."""
        places = {KV_POSITION: positions_part(block)} if evicts else {}
        queries = {QUERIES: queries_part(geometry, block)} if geometry.num_query_heads else {}
        return self.parts(geometry, block) | places | queries

    @abstractmethod
    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Chunks:
        """The KV that was kept, as near as the codec keeps it, from one tensor `[N, ...]` for every part."""

    def _kv(self, geometry: KVGeometry, block: int, dtype: Any) -> Part:
        heads, packed = geometry.num_kv_heads, self.packed(geometry.head_dim)
        return Part((geometry.num_layers, 2, 1, heads, block, packed), np.dtype(dtype), DIMENSION_NAMES)


class Raw(Codec):
    """The model's own numbers."""

    name = "raw"
    lossy = False

    def packed(self, head_dim: int) -> int:
        return head_dim

    def head_dim(self, packed: int) -> int:
        return packed

    def parts(self, geometry: KVGeometry, block: int) -> dict[str, Part]:
        return {"kv": self._kv(geometry, block, np.dtype(STORAGE_DTYPES[geometry.dtype]).newbyteorder("<"))}

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Chunks:
        (chunks,) = parts
        return chunks.view(dtype)


class Scaled(Codec):
    """Codes of `bits` bits, packed along the channels, and some float16 scales for every group."""

    bits: int
    scales_per_group: int

    @property
    def _group(self) -> tuple[int, int]:
        """The least number of codes that fill whole bytes, and these bytes."""
        divisor = math.gcd(self.bits, 8)
        return 8 // divisor, self.bits // divisor

    def packed(self, head_dim: int) -> int:
        if head_dim * self.bits % 8:
            raise ConfigError(
                f"{self.name} cannot pack this head dimension",
                expected=f"a multiple of {self._group[0]}",
                found=head_dim,
                remedy="Choose another --codec",
            )
        return head_dim * self.bits // 8

    def head_dim(self, packed: int) -> int:
        return packed * 8 // self.bits

    def parts(self, geometry: KVGeometry, block: int) -> dict[str, Part]:
        groups = geometry.num_layers * geometry.num_kv_heads * (geometry.head_dim + block)
        scale = Part((1, 1, self.scales_per_group * groups), np.dtype("<f2"), ("sample", "block", "scale"))
        return {"kv": self._kv(geometry, block, np.uint8), "kv_scale": scale}

    def encode(self, chunks: Chunks) -> list[Tensor]:
        """One tensor `[N, ...]` for every part. A scale that float16 cannot hold is infinite."""
        found = [self._encode(chunks[:, :, kind].float(), dim) for kind, dim in ((0, -2), (1, -1))]
        codes = torch.stack([self._pack(codes) for codes, _ in found], dim=2)
        scales = [scale.flatten(1) for _, group in found for scale in group]
        return [codes, torch.cat(scales, dim=1)]

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Chunks:
        packed, scales = parts
        count, num_layers, _, heads, block, width = packed.shape
        head_dim = self.head_dim(width)
        shapes = {0: (num_layers, heads, 1, head_dim), 1: (num_layers, heads, block, 1)}
        sizes = [math.prod(shape) for shape in shapes.values() for _ in range(self.scales_per_group)]
        groups = iter(scales.view(count, -1).split(sizes, dim=1))
        out = torch.empty((count, num_layers, 2, heads, block, head_dim), dtype=dtype, device=packed.device)
        for kind, shape in shapes.items():
            own = [next(groups).unflatten(1, shape).float() for _ in range(self.scales_per_group)]
            out[:, :, kind] = self._decode(self._unpack(packed[:, :, kind]), own)
        return out

    @abstractmethod
    def _encode(self, numbers: Float[Tensor, ...], dim: int) -> tuple[Tensor, list[Tensor]]:
        """Codes, one a byte, and the scales of the groups along `dim`."""

    @abstractmethod
    def _decode(self, codes: Tensor, scales: list[Tensor]) -> Float[Tensor, ...]: ...

    def _pack(self, codes: UInt8[Tensor, "... D"]) -> UInt8[Tensor, "... packed"]:
        """The first channel in the lowest bits of the first byte."""
        count, num_bytes = self._group
        words, together = codes.contiguous().view(WORDS[count]), 1
        while together < count:
            # Codes that are together move down to their neighbours, in the whole word at once.
            words = (words >> together * (8 - self.bits)).bitwise_or_(words).bitwise_and_(self._mask(2 * together))
            together *= 2
        return words.view(torch.uint8).unflatten(-1, (-1, count))[..., :num_bytes].flatten(-2)

    def _unpack(self, packed: UInt8[Tensor, "... packed"]) -> UInt8[Tensor, "... D"]:
        together, num_bytes = self._group
        words, *others = packed.unflatten(-1, (-1, num_bytes)).to(WORDS[together]).unbind(-1)
        for place, byte in enumerate(others, 1):
            words = (byte << 8 * place).bitwise_or_(words)
        while together > 1:
            together //= 2
            words = (words << together * (8 - self.bits)).bitwise_or_(words).bitwise_and_(self._mask(together))
        return words.view(torch.uint8)

    def _mask(self, together: int) -> int:
        """The bits of so many codes in as many bytes, in every such part of a word."""
        count, _ = self._group
        return sum((2 ** (together * self.bits) - 1) << 8 * first for first in range(0, count, together))


class Integer(Scaled):
    """Evenly spaced over the span of a group: `code / (2**bits - 1) * span + least`."""

    scales_per_group = 2

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"int{bits}", bits

    def _encode(self, numbers: Float[Tensor, ...], dim: int) -> tuple[Tensor, list[Tensor]]:
        # Faster apart than by `aminmax`, and by way of int16 than straight to uint8: torch has loops for vectors there.
        low, high = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
        # Rounded outwards, so that no number of the group lies beyond its codes.
        least = (low - low.abs() * HALF_ULP).half()
        span = ((high - least.float()) * (1 + HALF_ULP)).half()
        # A group whose numbers are all the same has no span.
        divisor = span.float().clamp_min(torch.finfo(torch.float32).tiny)
        codes = (numbers - least.float()).div_(divisor).mul_(self._levels).round_().clamp_(0, self._levels)
        return codes.to(torch.int16).to(torch.uint8), [span, least]

    def _decode(self, codes: Tensor, scales: list[Tensor]) -> Float[Tensor, ...]:
        step, least = scales[0] / self._levels, scales[1]
        if least.shape[-1] == 1:
            # Along the last axis torch broadcasts number by number.
            step, least = (scale.expand(codes.shape).contiguous() for scale in (step, least))
        return torch.addcmul(least, codes.float(), step)

    @property
    def _levels(self) -> int:
        return int(2**self.bits - 1)


class Float8(Scaled):
    """E4M3 floats of the numbers over their group's greatest magnitude (arXiv:2209.05433)."""

    name = "fp8"
    bits = 8
    scales_per_group = 1
    LARGEST = torch.finfo(torch.float8_e4m3fn).max

    def _encode(self, numbers: Float[Tensor, ...], dim: int) -> tuple[Tensor, list[Tensor]]:
        scale = (numbers.abs().amax(dim=dim, keepdim=True) / self.LARGEST * (1 + HALF_ULP)).half()
        divisor = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
        codes = (numbers / divisor).clamp_(-self.LARGEST, self.LARGEST)
        return codes.to(torch.float8_e4m3fn).view(torch.uint8), [scale]

    def _decode(self, codes: Tensor, scales: list[Tensor]) -> Float[Tensor, ...]:
        # Its bits are those of a float16 whose exponent lacks a bit and counts from 7, not 15; but for NaN, which no
        # sample has that is kept. (torch's own conversion takes several times as long.)
        halves = (codes.view(torch.int8).to(torch.int16) << 7).bitwise_and_(~0x4000).view(torch.float16)
        return halves.float() * (scales[0] * 2**8)


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Raw(), Float8(), *map(Integer, (8, 4, 3, 2)))}


def require_codec(name: str) -> Codec:
    """The codec of a name. Raises ConfigError for one that this version does not know."""
    if name not in CODECS:
        raise ConfigError("unknown codec", expected=", ".join(CODECS), found=name, remedy="Choose another --codec")
    return CODECS[name]
