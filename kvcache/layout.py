"""The one shape everything shares: KV `[L, 2, B, H, T, D]`, and the dtypes it is kept in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from .errors import ModelError

KV = Shaped[Tensor, "L 2 B H T D"]
"""Key (index 0) and value (index 1) of every layer, KV head and token of a batch."""

Pairs = list[tuple[Tensor, Tensor]]
"""Key and value `[B, H, T, D]` of every layer."""

DIMENSION_NAMES = ("layer", "kv", "sample", "head", "token", "channel")

# NumPy has no bfloat16: its 16 bits are kept as uint16 and the array's `logical_dtype` says what they mean.
STORAGE_DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}
LOGICAL_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGE_DTYPES}


@dataclass(frozen=True)
class KVGeometry:
    """What only a forward pass can tell: the shape of one token's KV."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    num_query_heads: int = 0
    """Of the queries that are kept beside the KV; 0 where none are."""

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def query_bytes_per_token(self) -> int:
        return self.num_layers * self.num_query_heads * self.head_dim * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def to_storage(tensor: Tensor) -> NDArray[Any]:
    """A CPU tensor as a NumPy array of its storage dtype, without a copy."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def from_storage(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """The tensor of logical `dtype` over the memory of a storage array."""
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor


def take_tokens(tensor: Shaped[Tensor, "... B H T D"], places: Int[Tensor, "B K"]) -> Shaped[Tensor, "... B H K D"]:
    """The tokens at some places of every sample; a negative place gives the first token."""
    index = places.clamp_min(0)[:, None, :, None]
    return tensor.gather(-2, index.expand(*tensor.shape[:-2], places.shape[1], tensor.shape[-1]))


def layer_pairs(past_key_values: Cache | Iterable[tuple[Any, Any]]) -> list[tuple[Tensor, Tensor]]:
    """Key and value `[B, H, T, D]` of every layer, from a transformers Cache or a legacy tuple of pairs
    (torch or NumPy).

    Raises ModelError where the layers do not share one shape: no tensor `[L, 2, B, H, T, D]` holds them.
    """
    pairs: list[tuple[Any, Any]]
    if isinstance(past_key_values, Cache):
        # Linear-attention layers have no such attributes at all.
        layers = past_key_values.layers
        pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    else:
        pairs = [(torch.as_tensor(key), torch.as_tensor(value)) for key, value in past_key_values]
    shapes = [tuple(tensor.shape) if tensor is not None else None for pair in pairs for tensor in pair]
    if not shapes or shapes[0] is None or len(shapes[0]) != 4 or any(s != shapes[0] for s in shapes):
        raise ModelError(
            "this cache does not fit one tensor [L,2,B,H,T,D]",
            expected="the same [B,H,T,D] for the key and value of every layer",
            found=f"{[shapes[i : i + 2] for i in range(0, len(shapes), 2)]}",
            remedy="Models with shared-KV, linear-attention or latent-attention layers are not supported",
        )
    return pairs


def stack_past_kv(past_key_values: Cache | Iterable[tuple[Any, Any]]) -> KV:
    """One tensor `[L, 2, B, H, T, D]` from a transformers Cache or a legacy tuple of (key, value) pairs.

    Gradients flow through. Raises ModelError where layers differ in shape.
    """
    return torch.stack([torch.stack(pair) for pair in layer_pairs(past_key_values)])


def token_features(kv: Shaped[Tensor, "*layers B H T D"], mask: Int[Tensor, "B T"]) -> Shaped[Tensor, "*layers N F"]:
    """One row of H * D features for every real token."""
    return kv.transpose(-3, -2).flatten(-2)[..., mask.bool(), :]
