"""Several teachers' KV as one thing to learn: their losses weighted, or their targets averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from ..kvcache.align.fusion import fuse
from .loss_terms import KVBatch


def fused(compared: Sequence[KVBatch], weights: Float[Tensor, "K L B T"], *, in_one_space: bool) -> list[KVBatch]:
    """What the losses are taken of, so that these add up to their weighted mean over the tokens that any teacher has.

    Where all targets lie `in_one_space` it is one batch with the mean target. Else it is each teacher's own, with its
    weights.
    """
    known = (weights.sum(dim=(0, 1)) > 0).long()
    if in_one_space:
        targets = [batch.target for batch in compared if batch.target is not None]
        return [replace(compared[0], target=fuse(weights, targets), mask=known)]
    total = known.sum().clamp_min(1)
    # A loss is a mean over its teacher's own tokens: its share of all tokens makes the sum one over all of them.
    return [
        replace(batch, weights=own * (batch.mask.sum() / total)) for batch, own in zip(compared, weights, strict=True)
    ]
