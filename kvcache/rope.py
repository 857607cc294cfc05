"""Rotary position embedding: taken off keys and put back, from recorded parameters alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .errors import ConfigError

Layout = Literal["half", "interleaved"]

REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""The types whose rotation depends on the position alone, and what each needs beside `rope_theta`."""

OPTIONAL = ("partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class RoPE:
    """The rotation of Su et al. 2021 (RoFormer), with `frequencies` in radians a token.

    The first `2 * len(frequencies)` channels of a key are rotated in pairs, the others never. Channel i pairs with
    channel i + len(frequencies) (`half`), or 2i with 2i + 1 (`interleaved`). `scale` is YaRN's attention factor, by
    which the rotated channels are multiplied as well.
    """

    frequencies: tuple[float, ...]
    layout: Layout
    scale: float = 1.0

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], head_dim: int) -> RoPE:
        """From what `rope_parameters` recorded.

        `dynamic` is `default` for all positions below `max_position_embeddings`, and an extraction reads no others.
        Raises ConfigError, with the reason, for parameters that cannot be undone and for damaged ones.
        """
        rope_type = _require_type(parameters)
        layout = _require_layout(parameters)
        required = {name: _require_number(parameters, name) for name in ("rope_theta", *REQUIRED[rope_type])}
        optional = {name: _require_number(parameters, name) for name in OPTIONAL if parameters.get(name) is not None}
        config = _FrequencyConfig(required | optional | {"truncate": parameters.get("truncate", True)}, head_dim)
        if config.rotary_dim < 2 or config.rotary_dim > head_dim or config.rotary_dim % 2:
            raise _refuse(f"an even number of rotated channels, 2 to {head_dim}", config.rotary_dim)
        frequencies, scale = _frequencies(rope_type, config)
        return cls(frequencies, layout, scale)

    def apply(
        self, keys: Float[Tensor, "*batch B H T D"], positions: Int[Tensor, "B T"]
    ) -> Float[Tensor, "*batch B H T D"]:
        """Rotate keys to their positions, in float32 at least. A negative position counts as 0, which rotates
        nothing."""
        return self._rotate(keys, positions, 1.0, self.scale)

    def remove(
        self, keys: Float[Tensor, "*batch B H T D"], positions: Int[Tensor, "B T"]
    ) -> Float[Tensor, "*batch B H T D"]:
        """The inverse of `apply`: keys as they were before they were rotated to their positions."""
        return self._rotate(keys, positions, -1.0, 1 / self.scale)

    def _rotate(
        self, keys: Float[Tensor, "*batch B H T D"], positions: Int[Tensor, "B T"], direction: float, scale: float
    ) -> Float[Tensor, "*batch B H T D"]:
        dtype = torch.promote_types(keys.dtype, torch.float32)
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=keys.device)
        # Models multiply in float32, and so far out in a text its rounding is part of the rotation.
        angles = (positions.clamp_min(0)[:, None, :, None].float() * frequencies).to(dtype)
        cos, sin = angles.cos() * scale, angles.sin() * (direction * scale)
        rotated, rest = keys.to(dtype).split([2 * len(frequencies), keys.shape[-1] - 2 * len(frequencies)], dim=-1)
        if self.layout == "half":
            first, second = rotated.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
        first, second = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        return torch.cat([turned, rest], dim=-1)


def rope_of(parameters: Mapping[str, Any], head_dim: int) -> RoPE | None:
    """None for the empty parameters of a model without rotary embedding. Raises as `RoPE.from_parameters` does."""
    return RoPE.from_parameters(parameters, head_dim) if parameters else None


@dataclass(frozen=True)
class _FrequencyConfig:
    """What the functions of transformers that compute frequencies ask of a model's config."""

    rope_parameters: dict[str, Any]
    head_dim: int
    num_attention_heads: int = 1

    @property
    def hidden_size(self) -> int:
        return self.head_dim

    @property
    def max_position_embeddings(self) -> float:
        return self.rope_parameters["max_position_embeddings"]

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    def standardize_rope_params(self) -> None:
        """Recorded parameters are in the standard form."""


def _frequencies(rope_type: str, config: _FrequencyConfig) -> tuple[tuple[float, ...], float]:
    """Frequencies as float32 has them, and the scale. Raises ConfigError where they are no numbers."""
    try:
        if rope_type == "default":
            share = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
            inverse, scale = 1.0 / config.rope_parameters["rope_theta"] ** share, 1.0
        else:
            inverse, scale = ROPE_INIT_FUNCTIONS[rope_type](config)
    except (ArithmeticError, ValueError) as error:
        raise _refuse("parameters that give frequencies", error) from error
    frequencies = tuple(inverse.tolist())
    if not all(map(math.isfinite, frequencies)):
        raise _refuse("finite frequencies", frequencies)
    return frequencies, float(scale)


def _require_type(parameters: Mapping[str, Any]) -> str:
    """The name of a supported type. Raises ConfigError for all others."""
    if nested := [name for name, value in parameters.items() if isinstance(value, Mapping)]:
        raise _refuse("one rotation for all layers", f"one each for {', '.join(nested)}")
    rope_type = parameters.get("rope_type")
    if not isinstance(rope_type, str) or rope_type not in REQUIRED:
        raise _refuse(f"one of the types {', '.join(REQUIRED)}", rope_type)
    return rope_type


def _require_layout(parameters: Mapping[str, Any]) -> Layout:
    layout: Any = parameters.get("layout")
    if layout not in get_args(Layout):
        raise _refuse(
            "a layout of channels, half or interleaved, that is the same in every layer",
            "none that fits" if layout is None else layout,
        )
    return layout


def _require_number(parameters: Mapping[str, Any], name: str) -> float:
    value = parameters.get(name)
    # `true` is a number to Python; the bounds are far outside of every model's.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value <= 1e15:
        raise _refuse(f"{name}, a positive number", value)
    return float(value)


def _refuse(expected: str, found: object) -> ConfigError:
    return ConfigError(
        "the rotary embedding of these keys cannot be undone",
        expected=expected,
        found=found,
        remedy="Compare the keys as they are: --key-space post-rope, and the teacher's own tokens",
    )
