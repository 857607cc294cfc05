"""Controls: a teacher's KV without what is said to help. Claims are held against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..kvcache.layout import take_tokens
from .channel_moments import Moments

KVControlName = Literal["none", "shuffled", "random"]

TEACHER_TENSORS = ("teacher_kv", "teacher_queries")
"""What a batch holds of every token of the teacher's, `[..., B, H, K, D]`."""


KVControl = Callable[[dict[str, Tensor], Sequence[int], Int[np.ndarray, " B"]], dict[str, Tensor]]
"""Changes the teacher's side of a batch: of the samples at some positions, so many tokens each. The same sample is
changed the same way in every epoch."""


@dataclass(frozen=True)
class ShuffledKV:
    """Every sample's KV permuted in time: all of the target but its place."""

    seed: int

    def __call__(
        self, batch: dict[str, Tensor], indices: Sequence[int], lengths: Int[np.ndarray, " B"]
    ) -> dict[str, Tensor]:
        order = self._order(indices, lengths, batch["teacher_kv"].shape[-2])
        moved = {name: take_tokens(batch[name], order) for name in TEACHER_TENSORS if name in batch}
        positions = batch.get("teacher_positions")
        return batch | moved | {"teacher_positions": order if positions is None else positions.gather(1, order)}

    def _order(self, indices: Sequence[int], lengths: Int[np.ndarray, " B"], width: int) -> Int[Tensor, "B K"]:
        """Where every teacher token is taken from: anywhere in its sample."""
        order = torch.arange(width).repeat(len(indices), 1)
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            permutation = np.random.default_rng([self.seed, index]).permutation(int(length))
            order[row, :length] = torch.from_numpy(permutation)
        return order


@dataclass(frozen=True)
class RandomKV:
    """Gaussian noise with the mean and the standard deviation of every channel of the teacher's, by name: all of the
    target's scale and none of its content."""

    seed: int
    moments: Mapping[str, Moments]

    def __call__(
        self, batch: dict[str, Tensor], indices: Sequence[int], lengths: Int[np.ndarray, " B"]
    ) -> dict[str, Tensor]:
        noise = {name: torch.zeros_like(batch[name]) for name in self.moments}
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            rng = np.random.default_rng([self.seed, index])
            for name, filled in noise.items():
                self._fill(filled.select(-4, row)[..., :length, :], name, rng)
        return batch | noise

    def _fill(self, tokens: Float[Tensor, "*L H K D"], name: str, rng: np.random.Generator) -> None:
        mean, std = (moment.squeeze(-4) for moment in self.moments[name])
        drawn = torch.from_numpy(rng.standard_normal(tuple(tokens.shape), dtype=np.float32))
        tokens.copy_(drawn * std + mean)
