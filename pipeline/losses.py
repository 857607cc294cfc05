"""Losses as pure functions, over real tokens only."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from jaxtyping import Float, Int, Shaped
from torch import Tensor

IGNORED = -100
"""The label of a token that is read but not learned."""


def next_token_loss(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"], reduction: str = "mean") -> Tensor:
    """Cross-entropy of each labelled token given the tokens before it, in nats.

    `reduction="none"` gives `[B, T-1]`, zero where the label is ignored. A batch in which every label is
    ignored (prompts cut before their end) has a mean of zero.
    """
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape[0], -1)
    return losses if reduction == "none" else losses.sum() / (labels[:, 1:] != IGNORED).sum().clamp_min(1)


def kv_mse(
    prediction: Float[Tensor, "L K B H T D"],
    target: Float[Tensor, "L K B H T D"],
    mask: Int[Tensor, "B T"],
    weights: Float[Tensor, "L B T"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error over the real tokens of a batch; layers, and key and value (K = 2), weigh the same.

    With targets normalised to unit variance, 1 is what predicting the mean would score.
    """
    return mean_over_tokens((wide(prediction) - wide(target)).square(), mask, weights)


def wide(kv: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """In float32 at least."""
    return kv.to(torch.promote_types(kv.dtype, torch.float32))


def mean_over_tokens(
    errors: Float[Tensor, "L K B H T D"], mask: Int[Tensor, "B T"], weights: Float[Tensor, "L B T"] | None = None
) -> Float[Tensor, ""]:
    """The mean of errors over the real tokens of a batch, and over all their layers, kinds, heads and channels; with
    `weights` each token's errors in a layer are multiplied first."""
    layers, kinds, _, heads, _, channels = errors.shape
    real = errors * mask[None, None, :, None, :, None]
    if weights is not None:
        real = real * weights[:, None, :, None, :, None]
    return real.sum() / (mask.sum() * layers * kinds * heads * channels).clamp_min(1)
