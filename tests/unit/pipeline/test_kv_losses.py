"""The KV losses against slow references, one number at a time, and what may not change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from statistics import fmean, pstdev

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.pipeline.kv_losses import (
    attention_kl,
    attention_weights,
    kv_cka,
    kv_cosine,
    kv_hybrid,
    kv_kava,
    kv_magnitude,
    kv_relation,
    kv_smooth_l1,
    kv_structural,
    per_layer_std,
)
from kvpipe.pipeline.loss_terms import KVBatch
from kvpipe.pipeline.losses import kv_mse
from torch import Tensor

Vector = list[float]
Attention = list[dict[int, float]]

# Padding at the end, and tokens in the middle that do not count.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]])
REAL = [(b, t) for b, t in MASK.nonzero().tolist()]


def kv_batch(seed: int = 0) -> KVBatch:
    """Sides of other heads and channels: 4 query heads each, on 2 KV heads of 3 channels and on 4 of 2."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 2, 3, 2, 5, 3)] * 3 + [(2, 2, 3, 4, 5, 2), (2, 3, 4, 5, 3), (2, 3, 4, 5, 2)]
    parts = [1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return KVBatch(*parts[:4], MASK, *parts[4:])


def few_heads(batch: KVBatch) -> KVBatch:
    """The student has half as many query heads as the teacher."""
    assert batch.student_queries is not None
    return replace(batch, student_queries=batch.student_queries[:, :, ::2])


def both_sides(batch: KVBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student, teacher = batch.queries
    return teacher, batch.teacher_kv[:, 0], student, batch.student_kv[:, 0], batch.mask


def attention_mse(batch: KVBatch) -> Tensor:
    prediction, target, mask = batch.aligned
    return kv_mse(prediction, target, mask, attention_weights(*both_sides(batch)[:2], mask))


LOSSES: dict[str, Callable[[KVBatch], Tensor]] = {
    "smooth-l1": lambda batch: kv_smooth_l1(*batch.aligned),
    "cosine": lambda batch: kv_cosine(*batch.aligned),
    "length": lambda batch: kv_magnitude(*batch.aligned),
    "hybrid": lambda batch: kv_hybrid(*batch.aligned),
    "kava": lambda batch: kv_kava(*batch.aligned),
    "attention-mse": attention_mse,
    "cka": lambda batch: kv_cka(batch.student_kv, batch.teacher_kv, batch.mask),
    "relation": lambda batch: kv_relation(batch.student_kv, batch.teacher_kv, batch.mask),
    "attention": lambda batch: attention_kl(*both_sides(batch)),
    "attention of unequal heads": lambda batch: attention_kl(*both_sides(few_heads(batch))),
    "structural": lambda batch: kv_structural(*batch.aligned[:2], *both_sides(batch)),
}


def over_vectors(error: Callable[[Vector, Vector], float]) -> Callable[[KVBatch], float]:
    """The mean of an error over the vectors of all layers, kinds, real tokens and heads."""

    def mean(batch: KVBatch) -> float:
        prediction, target, _ = batch.aligned
        places = [(layer, kind, b, head, t) for layer, kind, head in np.ndindex(2, 2, 2) for b, t in REAL]
        return fmean(error(prediction[place].tolist(), target[place].tolist()) for place in places)

    return mean


def squared(x: Vector, y: Vector) -> float:
    return fmean((a - b) ** 2 for a, b in zip(x, y, strict=True))


def huber(x: Vector, y: Vector) -> float:
    errors = [abs(a - b) for a, b in zip(x, y, strict=True)]
    return fmean(error**2 / 2 if error < 1 else error - 0.5 for error in errors)


def angle(x: Vector, y: Vector) -> float:
    return 1 - math.fsum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def lengths(x: Vector, y: Vector) -> float:
    return (math.log(math.hypot(*x)) - math.log(math.hypot(*y))) ** 2


def features(side: Tensor, layer: int, kind: int) -> list[Vector]:
    """All heads and channels of every real token."""
    return [side[layer, kind, b, :, t].flatten().tolist() for b, t in REAL]


def reference_kava(batch: KVBatch) -> float:
    losses = []
    for layer, kind in np.ndindex(2, 2):
        x, y = (list(chain(*features(side, layer, kind))) for side in batch.aligned[:2])
        losses.append(squared(x, y) / pstdev(y) ** 2)
    return fmean(losses)


def reference_cka(batch: KVBatch) -> float:
    """Kornblith et al. (2019), equation 3."""
    losses = []
    for layer, kind in np.ndindex(2, 2):
        sides = (np.array(features(side, layer, kind)) for side in (batch.student_kv, batch.teacher_kv))
        x, y = (side - side.mean(0) for side in sides)
        losses.append(1 - np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y))
    return fmean(losses)


def attention(queries: Tensor, keys: Tensor, real: list[int]) -> Attention:
    """What each real token looks at, of the real tokens that are no later: `[T, D]` each."""
    rows = []
    for token in real:
        scores = {other: float(queries[token] @ keys[other]) for other in real if other <= token}
        total = math.fsum(map(math.exp, scores.values()))
        rows.append({other: math.exp(score) / total for other, score in scores.items()})
    return rows


def divergences(teacher: Attention, student: Attention) -> list[float]:
    return [sum(p * math.log(p / s[j]) for j, p in t.items()) for t, s in zip(teacher, student, strict=True)]


def mean_of(heads: list[Attention]) -> Attention:
    return [{j: fmean(head[j] for head in token) for j in token[0]} for token in zip(*heads, strict=True)]


def head_attention(queries: Tensor, keys: Tensor, layer: int, sample: int) -> list[Attention]:
    real = [t for b, t in REAL if b == sample]
    group = queries.shape[2] // keys.shape[2]
    return [
        attention(queries[layer, sample, head], keys[layer, sample, head // group], real)
        for head in range(queries.shape[2])
    ]


def reference_attention(batch: KVBatch, merge: bool = False) -> float:
    teacher_queries, teacher_keys, student_queries, student_keys, _ = both_sides(batch)
    losses = []
    for layer, sample in np.ndindex(2, 3):
        teacher = head_attention(teacher_queries, teacher_keys, layer, sample)
        student = head_attention(student_queries, student_keys, layer, sample)
        if merge:
            teacher, student = [mean_of(teacher)], [mean_of(student)]
        for pair in zip(teacher, student, strict=True):
            losses += divergences(*pair)
    return fmean(losses)


def reference_relation(batch: KVBatch) -> float:
    """Two relation heads: a head of the student's each, and two of the teacher's."""
    losses = []
    for layer, kind, sample, head in np.ndindex(2, 2, 3, 2):
        real = [t for b, t in REAL if b == sample]
        student = batch.student_kv[layer, kind, sample, head]
        teacher = torch.cat(list(batch.teacher_kv[layer, kind, sample, 2 * head : 2 * head + 2]), dim=-1)
        relations = [attention(rows / math.sqrt(rows.shape[1]), rows, real) for rows in (teacher, student)]
        losses += divergences(*relations)
    return fmean(losses)


def reference_weights(batch: KVBatch) -> Tensor:
    queries, keys = both_sides(batch)[:2]
    weights = torch.zeros(2, 3, 5, dtype=torch.float64)
    for layer, sample in np.ndindex(2, 3):
        for row in mean_of(head_attention(queries, keys, layer, sample)):
            for token, share in row.items():
                weights[layer, sample, token] += share
    return weights


def reference_attention_mse(batch: KVBatch) -> float:
    weights, losses = reference_weights(batch), []
    for layer, kind in np.ndindex(2, 2):
        pairs = zip(*(features(side, layer, kind) for side in batch.aligned[:2]), strict=True)
        losses += [float(weights[layer, b, t]) * squared(x, y) for (b, t), (x, y) in zip(REAL, pairs, strict=True)]
    return fmean(losses)


REFERENCES: dict[str, Callable[[KVBatch], float]] = {
    "smooth-l1": over_vectors(huber),
    "cosine": over_vectors(angle),
    "length": over_vectors(lengths),
    "hybrid": over_vectors(lambda x, y: squared(x, y) + angle(x, y)),
    "kava": reference_kava,
    "attention-mse": reference_attention_mse,
    "cka": reference_cka,
    "relation": reference_relation,
    "attention": reference_attention,
    "attention of unequal heads": lambda batch: reference_attention(few_heads(batch), merge=True),
    "structural": lambda batch: 2 * over_vectors(angle)(batch) + reference_attention(batch),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_its_definition_says(name: str, seed: int) -> None:
    batch = kv_batch(seed)
    assert float(LOSSES[name](batch)) == pytest.approx(REFERENCES[name](batch), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_loss_agrees_with_finite_differences(name: str) -> None:
    batch = kv_batch()
    students = [batch.prediction, batch.student_kv, batch.student_queries]

    def of_students(prediction: Tensor, kv: Tensor, queries: Tensor) -> Tensor:
        return LOSSES[name](replace(batch, prediction=prediction, student_kv=kv, student_queries=queries))

    assert torch.autograd.gradcheck(of_students, [side.requires_grad_() for side in students if side is not None])


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"attention of unequal heads"}))
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name: str) -> None:
    batch = kv_batch()
    twin = replace(batch, prediction=batch.target, student_kv=batch.teacher_kv, student_queries=batch.teacher_queries)
    assert float(LOSSES[name](twin)) == pytest.approx(0, abs=1e-12)


def test_direction_and_length_do_not_see_each_other() -> None:
    prediction, _, mask = kv_batch().aligned
    assert float(kv_cosine(prediction, 3 * prediction, mask)) == pytest.approx(0, abs=1e-12)
    assert float(kv_magnitude(prediction, 3 * prediction, mask)) == pytest.approx(math.log(3) ** 2, rel=1e-6)
    turned = prediction.flip(-1)
    assert float(kv_magnitude(prediction, turned, mask)) == pytest.approx(0, abs=1e-12)
    assert float(kv_cosine(prediction, turned, mask)) > 0.1


@given(scale=st.floats(0.1, 100))
def test_kava_does_not_depend_on_the_scale_of_a_layer(scale: float) -> None:
    prediction, target, mask = kv_batch().aligned
    scales = torch.tensor([scale, 1.0]).view(2, 1, 1, 1, 1, 1)
    torch.testing.assert_close(kv_kava(scales * prediction, scales * target, mask), kv_kava(prediction, target, mask))


def test_a_layer_that_never_varies_is_not_blown_up() -> None:
    _, target, mask = kv_batch().aligned
    std = per_layer_std(torch.cat([target, torch.full_like(target, 0.7)]).requires_grad_(), mask)
    assert not std.requires_grad
    assert torch.equal(std[2:], torch.ones_like(std[2:]))
    assert (std[:2] != 1).all()


@pytest.mark.parametrize("scale", [1e-8, 1e9])
def test_cka_sees_neither_rotation_nor_scale_nor_shift(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(1, 2, 4, 2, 100, 3, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    rotated = (kv.transpose(3, 4).flatten(4) @ rotation).unflatten(4, (1, 6)).transpose(3, 4)
    mask = torch.ones(4, 100, dtype=torch.int64)
    assert float(kv_cka(kv, scale * rotated + scale, mask)) == pytest.approx(0, abs=1e-4)
    assert float(kv_cka(kv, torch.randn(kv.shape, generator=generator), mask)) > 0.9


def test_cka_of_what_never_varies_is_that_of_unrelated_tokens() -> None:
    batch = kv_batch()
    flat = torch.ones_like(batch.student_kv).requires_grad_()
    loss = kv_cka(flat, batch.teacher_kv, batch.mask)
    loss.backward()
    assert loss.item() == pytest.approx(1)
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_heads_cut_in_two_have_the_same_relations() -> None:
    student = kv_batch().teacher_kv
    wide = student.unflatten(3, (2, 2)).transpose(4, 5).flatten(5)
    assert float(kv_relation(student.float(), wide, MASK)) == pytest.approx(0, abs=1e-6)


def test_attention_weights_are_what_tokens_get_and_one_in_the_mean_of_a_sample() -> None:
    batch = kv_batch()
    weights = attention_weights(*both_sides(batch)[:2], batch.mask)
    torch.testing.assert_close(weights, reference_weights(batch))
    torch.testing.assert_close(weights.sum(2), MASK.sum(1).double().expand(2, 3))
    assert not weights[:, MASK == 0].any()


def test_weights_of_one_leave_the_squared_error() -> None:
    prediction, target, mask = kv_batch().aligned
    ones = torch.ones(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(kv_mse(prediction, target, mask, ones), kv_mse(prediction, target, mask))
