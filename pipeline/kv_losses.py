"""Losses between two KVs as pure functions, over real tokens only, in float32 at least.

Layers, and key and value, weigh the same in all of them. `mask` is 1 on the tokens that count; losses that are a mean
over tokens take `weights` as well, by layer and token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..kvcache.layout import token_features
from .losses import kv_mse, mean_over_tokens, wide

EPSILON = 1e-8
"""Below every norm of KV there is."""


def kv_smooth_l1(
    prediction: Float[Tensor, "L K B H T D"],
    target: Float[Tensor, "L K B H T D"],
    mask: Int[Tensor, "B T"],
    weights: Float[Tensor, "L B T"] | None = None,
) -> Float[Tensor, ""]:
    """Huber's loss with its corner at 1: as half the squared error for small errors, as their size for large ones."""
    return mean_over_tokens(F.smooth_l1_loss(wide(prediction), wide(target), reduction="none"), mask, weights)


def kv_cosine(
    prediction: Float[Tensor, "L K B H T D"],
    target: Float[Tensor, "L K B H T D"],
    mask: Int[Tensor, "B T"],
    weights: Float[Tensor, "L B T"] | None = None,
) -> Float[Tensor, ""]:
    """The direction of every head's vector: 1 - cosine."""
    cosine = F.cosine_similarity(wide(prediction), wide(target), dim=-1, eps=EPSILON)
    return mean_over_tokens(1 - cosine[..., None], mask, weights)


def kv_magnitude(
    prediction: Float[Tensor, "L K B H T D"],
    target: Float[Tensor, "L K B H T D"],
    mask: Int[Tensor, "B T"],
    weights: Float[Tensor, "L B T"] | None = None,
) -> Float[Tensor, ""]:
    """The length of every head's vector: the squared difference of log norms."""
    ours, theirs = ((wide(kv).square().sum(-1) + EPSILON).log() / 2 for kv in (prediction, target))
    return mean_over_tokens((ours - theirs).square()[..., None], mask, weights)


def kv_hybrid(
    prediction: Float[Tensor, "L K B H T D"],
    target: Float[Tensor, "L K B H T D"],
    mask: Int[Tensor, "B T"],
    weights: Float[Tensor, "L B T"] | None = None,
) -> Float[Tensor, ""]:
    """Squared error and direction, in equal parts."""
    prediction, target = wide(prediction), wide(target)
    return kv_mse(prediction, target, mask, weights) + kv_cosine(prediction, target, mask, weights)


def per_layer_std(target: Float[Tensor, "L K B H T D"], mask: Int[Tensor, "B T"]) -> Float[Tensor, "L K 1 1 1 1"]:
    """The standard deviation of each layer, key and value apart, over the real tokens of a batch; without a graph.

    It is 1 where nothing varies: what carries nothing is not blown up.
    """
    kv, real = wide(target.detach()), mask[None, None, :, None, :, None]
    count = (mask.sum() * kv.shape[3] * kv.shape[5]).clamp_min(1)
    mean = (kv * real).sum((2, 3, 4, 5), keepdim=True) / count
    std = (((kv - mean) * real).square().sum((2, 3, 4, 5), keepdim=True) / count).sqrt()
    return torch.where(std > 1e-6, std, 1)


def kv_kava(
    prediction: Float[Tensor, "L K B H T D"],
    target: Float[Tensor, "L K B H T D"],
    mask: Int[Tensor, "B T"],
    weights: Float[Tensor, "L B T"] | None = None,
) -> Float[Tensor, ""]:
    """Squared error in units of the spread of each layer's target, key and value apart, as in KaVa (2025)."""
    std = per_layer_std(target, mask)
    return kv_mse(prediction / std, target / std, mask, weights)


def kv_cka(
    student: Float[Tensor, "L K B Hs T Ds"], teacher: Shaped[Tensor, "L K B Ht T Dt"], mask: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """1 - linear CKA (Kornblith et al., 2019) of each layer's tokens of the batch. Needs no projection: the sides may
    differ in heads and channels. It is 1 where a side does not vary."""
    x, y = (_centred_features(kv, mask) for kv in (student, teacher))
    cross, own_x, own_y = (gram.square().sum((2, 3)) for gram in (_products(x.mT, y.mT), _gram(x), _gram(y)))
    return (1 - cross / (own_x * own_y).clamp_min(EPSILON**2).sqrt()).mean()


def kv_relation(
    student: Float[Tensor, "L K B Hs T Ds"], teacher: Shaped[Tensor, "L K B Ht T Dt"], mask: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Relations between keys, and between values, as in MiniLM (Wang et al., 2020; 2021): the KL divergence of the
    student's from the teacher's softmax over each token's scaled products with itself and the tokens before it.

    Needs no projection. A side's heads are laid side by side and cut into relation heads: as many as divide the KV
    heads of both sides, so that none is torn apart.
    """
    heads = math.gcd(student.shape[3], teacher.shape[3])
    ours, theirs = (_log_attention(_relations(kv, heads), mask) for kv in (student, teacher))
    return _divergence(theirs, ours, mask)


def attention_kl(
    teacher_queries: Shaped[Tensor, "L B Qt T Dt"],
    teacher_keys: Shaped[Tensor, "L B Ht T Dt"],
    student_queries: Float[Tensor, "L B Qs T Ds"],
    student_keys: Float[Tensor, "L B Hs T Ds"],
    mask: Int[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """The KL divergence of the student's attention from the teacher's, causal and among the tokens of the mask.
    Queries are scaled already. Where the sides differ in query heads, the means over heads are compared."""
    teacher = _log_attention(_attention_logits(teacher_queries, teacher_keys), mask)
    student = _log_attention(_attention_logits(student_queries, student_keys), mask)
    if student.shape[2] != teacher.shape[2]:
        teacher, student = _mean_of_heads(teacher), _mean_of_heads(student)
    return _divergence(teacher, student, mask)


def attention_weights(
    teacher_queries: Shaped[Tensor, "L B Q T D"], teacher_keys: Shaped[Tensor, "L B H T D"], mask: Int[Tensor, "B T"]
) -> Float[Tensor, "L B T"]:
    """How much attention each token gets from all real tokens of its sample, in the mean over heads; 0 on others.

    Every token gives away 1 in all, so that the mean over a sample's real tokens is 1 in every layer.
    """
    attention = _log_attention(_attention_logits(teacher_queries, teacher_keys), mask).exp()
    return (attention * mask[None, :, None, :, None]).mean(2).sum(2)


def kv_structural(
    prediction: Float[Tensor, "L 2 B H T D"],
    target: Float[Tensor, "L 2 B H T D"],
    teacher_queries: Shaped[Tensor, "L B Qt T Dt"],
    teacher_keys: Shaped[Tensor, "L B Ht T Dt"],
    student_queries: Float[Tensor, "L B Qs T Ds"],
    student_keys: Float[Tensor, "L B Hs T Ds"],
    mask: Int[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """The direction of keys, that of values, and the divergence of the attention that the keys lead to, in equal parts.

    Keys and queries are the models' own, prediction and target lie in one space.
    """
    keys, values = (kv_cosine(prediction[:, k : k + 1], target[:, k : k + 1], mask) for k in (0, 1))
    return keys + values + attention_kl(teacher_queries, teacher_keys, student_queries, student_keys, mask)


def _products(a: Shaped[Tensor, "*shape N D"], b: Shaped[Tensor, "*others M D"]) -> Float[Tensor, "... N M"]:
    """Of every row with every row. Under autocast they would be rounded to its half precision."""
    with torch.autocast(a.device.type, enabled=False):
        return wide(a) @ wide(b).mT


def _relations(kv: Shaped[Tensor, "L K B H T D"], heads: int) -> Float[Tensor, "L K B R T T"]:
    rows = kv.transpose(3, 4).flatten(4).unflatten(4, (heads, -1)).transpose(3, 4)
    return _products(rows, rows) * rows.shape[-1] ** -0.5


def _attention_logits(
    queries: Shaped[Tensor, "L B Q T D"], keys: Shaped[Tensor, "L B H T D"]
) -> Float[Tensor, "L B Q T T"]:
    """Every group of query heads with its KV head."""
    grouped = queries.unflatten(2, (keys.shape[2], -1))
    return _products(grouped, keys[:, :, :, None]).flatten(2, 3)


def _seen(mask: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """Which tokens a token looks at: itself, and the real ones before it."""
    tokens = mask.shape[1]
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(tokens, dtype=torch.bool, device=mask.device)
    return (before & mask.bool()[:, None, :] | itself)[:, None]


def _log_attention(logits: Float[Tensor, "*layers B H T T"], mask: Int[Tensor, "B T"]) -> Tensor:
    return logits.masked_fill(~_seen(mask), float("-inf")).log_softmax(-1)


def _mean_of_heads(log_attention: Float[Tensor, "L B H T T"]) -> Float[Tensor, "L B 1 T T"]:
    # What no head sees has no logarithm to differentiate: its gradient would be NaN.
    unseen = log_attention.isneginf()
    mean = log_attention.masked_fill(unseen, 0).logsumexp(2, keepdim=True) - math.log(log_attention.shape[2])
    return mean.masked_fill(unseen[:, :, :1], float("-inf"))


def _divergence(teacher: Tensor, student: Tensor, mask: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """KL(teacher || student) of log distributions `[..., B, H, T, T]`, in the mean over real tokens and the rest."""
    unseen = teacher.isneginf()
    terms = teacher.exp() * (teacher.masked_fill(unseen, 0) - student.masked_fill(unseen, 0))
    rows = terms.sum(-1).flatten(0, -4) * mask[None, :, None, :]
    return rows.sum() / (mask.sum().clamp_min(1) * rows.shape[0] * rows.shape[2])


def _centred_features(kv: Shaped[Tensor, "L K B H T D"], mask: Int[Tensor, "B T"]) -> Float[Tensor, "L K N F"]:
    """A row of all heads and channels for every real token, less their mean, at a common scale: fourth powers of raw
    keys would leave the range of float32."""
    rows = token_features(wide(kv), mask)
    centred = rows - rows.mean(2, keepdim=True)
    return centred / centred.norm(dim=(2, 3), keepdim=True).clamp_min(EPSILON)


def _gram(rows: Float[Tensor, "L K N F"]) -> Float[Tensor, "L K G G"]:
    """x'x or xx', whichever is the smaller: they have one norm."""
    return _products(rows, rows) if rows.shape[2] < rows.shape[3] else _products(rows.mT, rows.mT)
