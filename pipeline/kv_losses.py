"""Losses between two KVs as pure functions, over real tokens only, in float32 at least.

Layers, and key and value, weigh the same in all of them. `mask` is 1 on the tokens that count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .losses import kv_mse, mean_over_tokens

EPSILON = 1e-8
"""Below every norm and variance of KV there is."""


def kv_smooth_l1(
    prediction: Float[Tensor, "L K B H T D"], target: Float[Tensor, "L K B H T D"], mask: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Huber's loss with its corner at 1: as half the squared error for small errors, as their size for large ones."""
    return mean_over_tokens(F.smooth_l1_loss(prediction, target, reduction="none"), mask)


def kv_mercator(
    prediction: Float[Tensor, "L K B H T D"],
    target: Float[Tensor, "L K B H T D"],
    mask: Int[Tensor, "B T"],
    magnitude_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """The direction of every head's vector: 1 - cosine; and, weakly if wanted, its length: the squared difference of
    log norms."""
    loss = 1 - F.cosine_similarity(prediction, target, dim=-1, eps=EPSILON)
    if magnitude_weight:
        norms = [(kv.square().sum(-1) + EPSILON).log() / 2 for kv in (prediction, target)]
        loss = loss + magnitude_weight * (norms[0] - norms[1]).square()
    return mean_over_tokens(loss[..., None], mask)


def kv_hybrid(
    prediction: Float[Tensor, "L K B H T D"], target: Float[Tensor, "L K B H T D"], mask: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Squared error and direction, in equal parts."""
    return kv_mse(prediction, target, mask) + kv_mercator(prediction, target, mask)


def kv_kava(
    prediction: Float[Tensor, "L K B H T D"], target: Float[Tensor, "L K B H T D"], mask: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Squared error in units of each layer's own spread, key and value apart, as in KaVa (2025): of the target's
    standard deviation over the batch."""
    real = mask[None, None, :, None, :, None]
    count = (mask.sum() * target.shape[3] * target.shape[5]).clamp_min(1)
    mean = (target * real).sum((2, 3, 4, 5), keepdim=True) / count
    variance = ((target - mean).square() * real).sum((2, 3, 4, 5), keepdim=True) / count
    std = (variance + EPSILON).sqrt().detach()
    return kv_mse(prediction / std, target / std, mask)


def kv_cka(
    student: Float[Tensor, "L K B Hs T Ds"], teacher: Shaped[Tensor, "L K B Ht T Dt"], mask: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """1 - linear CKA (Kornblith et al., 2019) of each layer's tokens of the batch. Needs no projection: the sides may
    differ in heads and channels."""
    x, y = (_centred_features(kv, mask) for kv in (student, teacher))
    cross = (x.mT @ y).square().sum((-1, -2))
    # x'x and xx' have one norm; the smaller is the cheaper.
    own = [_gram(side).square().sum((-1, -2)) for side in (x, y)]
    return (1 - cross / (own[0] * own[1] + EPSILON).sqrt()).mean()


def kv_relation(
    student: Float[Tensor, "L K B Hs T Ds"], teacher: Shaped[Tensor, "L K B Ht T Dt"], mask: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Relations between keys, and between values, as in MiniLM (Wang et al., 2020; 2021): the KL divergence of the
    student's from the teacher's softmax over each token's scaled products with itself and the tokens before it.

    Needs no projection. Heads are laid side by side and cut into as many relation heads as both sides have KV heads,
    where they have equally many, else into one.
    """
    heads = student.shape[3] if student.shape[3] == teacher.shape[3] else 1
    logits = []
    for kv in (student, teacher):
        rows = kv.to(torch.promote_types(kv.dtype, torch.float32)).transpose(3, 4).flatten(4)
        rows = rows.unflatten(4, (heads, -1)).transpose(3, 4)
        logits.append(rows @ rows.mT * rows.shape[-1] ** -0.5)
    return _divergence(_log_attention(logits[1], mask), _log_attention(logits[0], mask), mask)


def attention_kl(
    student_queries: Float[Tensor, "L B Qs T Ds"],
    student_keys: Float[Tensor, "L B Hs T Ds"],
    teacher_queries: Shaped[Tensor, "L B Qt T Dt"],
    teacher_keys: Shaped[Tensor, "L B Ht T Dt"],
    mask: Int[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """The KL divergence of the student's attention from the teacher's, causal and without padding. Queries are scaled
    already. Where the sides differ in their number of query heads, the means over heads are compared."""
    student, teacher = (
        _log_attention(_attention_logits(queries, keys), mask)
        for queries, keys in ((student_queries, student_keys), (teacher_queries, teacher_keys))
    )
    if student.shape[2] != teacher.shape[2]:
        student, teacher = (_mean_of_heads(side) for side in (student, teacher))
    return _divergence(teacher, student, mask)


def attention_received(
    queries: Shaped[Tensor, "L B Q T D"], keys: Shaped[Tensor, "L B H T D"], mask: Int[Tensor, "B T"]
) -> Float[Tensor, "L B T"]:
    """How much attention each token gets, in the mean over heads and later tokens; 1 in the mean over a layer's real
    tokens, 0 on others."""
    attention = _log_attention(_attention_logits(queries, keys), mask).exp() * mask[None, :, None, :, None]
    # A token is seen by itself and those after it alone.
    seen_by = mask.flip(1).cumsum(1).flip(1).clamp_min(1)
    received = attention.mean(2).sum(2) / seen_by * mask
    return received / (received.sum((1, 2), keepdim=True) / mask.sum()).clamp_min(EPSILON)


def _attention_logits(
    queries: Shaped[Tensor, "L B Q T D"], keys: Shaped[Tensor, "L B H T D"]
) -> Float[Tensor, "L B Q T T"]:
    """Every group of query heads with its KV head."""
    wide = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    grouped = queries.to(wide).unflatten(2, (keys.shape[2], -1))
    return (grouped @ keys.to(wide)[:, :, :, None].mT).flatten(2, 3)


def _seen(mask: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """Which tokens a token looks at: itself, and the real ones before it."""
    tokens = mask.shape[1]
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(tokens, dtype=torch.bool, device=mask.device)
    return (before & mask.bool()[:, None, :] | itself)[:, None]


def _log_attention(logits: Float[Tensor, "*layers B H T T"], mask: Int[Tensor, "B T"]) -> Tensor:
    return logits.masked_fill(~_seen(mask), float("-inf")).log_softmax(-1)


def _mean_of_heads(log_attention: Float[Tensor, "L B H T T"]) -> Float[Tensor, "L B 1 T T"]:
    return log_attention.logsumexp(2, keepdim=True) - torch.tensor(float(log_attention.shape[2])).log()


def _divergence(teacher: Tensor, student: Tensor, mask: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """KL(teacher || student) of log distributions `[..., B, H, T, T]`, in the mean over real tokens and the rest."""
    unseen = teacher.isneginf()
    terms = teacher.exp() * (teacher.masked_fill(unseen, 0) - student.masked_fill(unseen, 0))
    rows = terms.sum(-1).flatten(0, -4) * mask[None, :, None, :]
    return rows.sum() / (mask.sum().clamp_min(1) * rows.shape[0] * rows.shape[2])


def _centred_features(kv: Shaped[Tensor, "L K B H T D"], mask: Int[Tensor, "B T"]) -> Float[Tensor, "L K N F"]:
    """A row of all heads and channels for every real token, less their mean."""
    rows = kv.to(torch.promote_types(kv.dtype, torch.float32)).transpose(3, 4).flatten(4)[:, :, mask.bool()]
    return rows - rows.mean(2, keepdim=True)


def _gram(rows: Float[Tensor, "L K N F"]) -> Float[Tensor, "L K G G"]:
    return rows @ rows.mT if rows.shape[-2] < rows.shape[-1] else rows.mT @ rows
