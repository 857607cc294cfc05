"""The moments of a teacher's KV as a student sees it: what targets are normalised by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .distiller import KVDistiller
from .training_data import KVDataset

MAX_SAMPLES = 256
"""A channel's moments settle within a few thousand tokens."""

BATCH = 16


def teacher_moments(
    distiller: KVDistiller, dataset: KVDataset, indices: Sequence[int]
) -> tuple[Float[Tensor, "L 2 1 H 1 D"], Float[Tensor, "L 2 1 H 1 D"]]:
    """Mean and standard deviation of every channel over the compared tokens of the first samples of `indices`."""
    chosen = [int(index) for index in indices[:MAX_SAMPLES]]
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for start in range(0, len(chosen), BATCH):
        batch = dataset.__getitems__(chosen[start : start + BATCH])
        kv, mask = distiller.teacher_side(batch)
        # Tokens that are not compared are zero from here on, so they add nothing to either sum.
        tokens = kv.double() * mask[None, None, :, None, :, None]
        count += int(mask.sum())
        total = total + tokens.sum(dim=(2, 4), keepdim=True)
        squares = squares + tokens.square().sum(dim=(2, 4), keepdim=True)
    mean = total / max(1, count)
    variance = (squares / max(1, count) - mean.square()).clamp_min(0)
    return mean.float(), variance.sqrt().float()
