"""How much each of several teachers counts: against plain loops, and by what must hold of any weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.align.fusion import (
    BestOfFusion,
    FixedFusion,
    Fusion,
    Granularity,
    LearnedFusion,
    Router,
    SimilarityFusion,
    entropy,
    fuse,
    masked_softmax,
    token_rows,
)
from torch import Tensor

LAYERS, SAMPLES, TOKENS = 2, 3, 4
STUDENT = (LAYERS, 2, SAMPLES, 2, TOKENS, 3)
SPACES = [(1, 5), (2, 3), (4, 2)]
"""Heads and channels of the teachers' targets."""

LAYER_NUMBERS = range(LAYERS)
PER: tuple[Granularity, ...] = ("layer", "sample", "token")


def predictions(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(LAYERS, 2, SAMPLES, h, TOKENS, d, generator=generator) for h, d in SPACES]


def student_kv() -> Tensor:
    return torch.randn(STUDENT, generator=torch.Generator().manual_seed(7))


def prototypes(points: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(LAYERS, points, 2 * h * d, generator=generator) for h, d in SPACES]


def trained_router(per: Granularity, router: Router = "linear") -> LearnedFusion:
    """One that no longer gives all teachers the same."""
    torch.manual_seed(3)
    fusion = LearnedFusion(len(SPACES), LAYERS, LAYERS * 2 * 2 * 3, per, router)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_()
    return fusion


FUSIONS: dict[str, Callable[[], Fusion]] = {
    "fixed": lambda: FixedFusion([2.0, 0.0, 1.0]),
    "best-of": lambda: BestOfFusion(torch.tensor([[0.1, 0.9], [0.5, -0.2], [0.4, 0.3]])),
    **{f"similarity {per}": lambda per=per: SimilarityFusion(prototypes(), 0.3, per) for per in PER},
    **{f"learned {per}": lambda per=per: trained_router(per) for per in PER},
    "mlp": lambda: trained_router("token", "mlp"),
}

masks = st.lists(st.integers(0, 1), min_size=3 * SAMPLES * TOKENS, max_size=3 * SAMPLES * TOKENS).map(
    lambda bits: torch.tensor(bits).view(3, SAMPLES, TOKENS)
)
ALL = torch.ones(3, SAMPLES, TOKENS, dtype=torch.long)


@pytest.mark.parametrize("name", FUSIONS)
@given(mask=masks)
def test_weights_sum_to_one_over_the_teachers_that_have_a_token(name: str, mask: Tensor) -> None:
    weights = FUSIONS[name]()(student_kv(), predictions(), mask)
    assert weights.shape == (3, LAYERS, SAMPLES, TOKENS)
    assert (weights >= 0).all()
    assert not weights[(mask == 0)[:, None].expand_as(weights)].any()
    # The second of the fixed weights is 0: where it is alone nothing is learned.
    counts = mask * torch.tensor([1, 0, 1])[:, None, None] if name == "fixed" else mask
    expected = counts.any(dim=0).float().expand(LAYERS, -1, -1)
    torch.testing.assert_close(weights.sum(dim=0), expected)


@pytest.mark.parametrize("name", FUSIONS)
def test_the_student_learns_nothing_through_the_weights(name: str) -> None:
    student, laid_out = student_kv().requires_grad_(), [p.requires_grad_() for p in predictions()]
    fusion = FUSIONS[name]()
    weights = fusion(student, laid_out, ALL)
    trainable = list(fusion.parameters())
    assert bool(trainable) == ("learned" in name or name == "mlp")
    if trainable:
        weights[0].sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in trainable if p.dim() > 1)
    assert student.grad is None
    assert all(p.grad is None for p in laid_out)


@pytest.mark.parametrize("per", PER)
def test_an_untrained_router_weighs_all_the_same(per: Granularity) -> None:
    weights = LearnedFusion(3, LAYERS, 24, per, "linear")(student_kv(), predictions(), ALL)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.parametrize("name", [name for name in FUSIONS if name.split()[-1] in PER])
def test_weights_are_of_each_layer_sample_or_token(name: str) -> None:
    weights = FUSIONS[name]()(student_kv(), predictions(), ALL)
    free = {"layer": (1,), "sample": (2,), "token": (2, 3)}[name.split()[-1]]
    for axis in (1, 2, 3):
        same = torch.allclose(weights, weights.narrow(axis, 0, 1).expand_as(weights))
        assert same == (axis not in free)


def test_fixed_weights_are_shared_out_among_those_that_have_a_token() -> None:
    mask = ALL.clone()
    mask[0, 0] = 0
    weights = FixedFusion([2.0, 1.0, 1.0])(student_kv(), predictions(), mask)
    assert weights[:, 0, 1, 0].tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert weights[:, 0, 0, 0].tolist() == pytest.approx([0, 0.5, 0.5])


def test_the_best_teacher_of_a_layer_is_the_next_best_where_it_has_nothing() -> None:
    mask = ALL.clone()
    mask[1, 0], mask[:, 2] = 0, 0
    weights = FUSIONS["best-of"]()(student_kv(), predictions(), mask)
    assert weights.argmax(dim=0)[:, 1].tolist() == [[1] * TOKENS, [0] * TOKENS]
    assert weights.argmax(dim=0)[:, 0].tolist() == [[2] * TOKENS, [0] * TOKENS]
    assert weights[:, :, :2].amax(dim=0).eq(1).all()
    assert not weights[:, :, 2].any()


@pytest.mark.parametrize("per", PER)
def test_similarity_is_a_loop_over_tokens_and_prototypes(per: Granularity) -> None:
    mask = ALL.clone()
    mask[0, 1, 2:] = 0
    found = SimilarityFusion(prototypes(), 0.3, per)(student_kv(), predictions(), mask)
    scores = torch.tensor(
        [
            [
                [[_distance(k, layer, b, t) / -0.3 for t in range(TOKENS)] for b in range(SAMPLES)]
                for layer in LAYER_NUMBERS
            ]
            for k in range(3)
        ]
    )
    for layer, sample, token in product(LAYER_NUMBERS, range(SAMPLES), range(TOKENS)):
        own = torch.tensor([_mean_score(scores[k], mask[k], per, layer, sample, token) for k in range(3)])
        own[mask[:, sample, token] == 0] = -math.inf
        torch.testing.assert_close(found[:, layer, sample, token], own.softmax(dim=0), rtol=1e-4, atol=1e-5)


def _distance(teacher: int, layer: int, sample: int, token: int) -> float:
    row = predictions()[teacher][layer, :, sample, :, token].flatten()
    return min(float((row - point).square().mean()) for point in prototypes()[teacher][layer])


def _mean_score(scores: Tensor, mask: Tensor, per: Granularity, layer: int, sample: int, token: int) -> float:
    if per == "token":
        return float(scores[:, sample, token].mean())
    return float((scores[layer][mask.bool()] if per == "layer" else scores[:, sample, mask[sample].bool()]).mean())


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("per", PER)
def test_permuting_teachers_permutes_their_weights(per: Granularity, order: tuple[int, ...]) -> None:
    mask = ALL.clone()
    mask[0, 1, 2:] = 0
    plain = SimilarityFusion(prototypes(), 0.3, per)(student_kv(), predictions(), mask)
    turned = SimilarityFusion([prototypes()[k] for k in order], 0.3, per)(
        student_kv(), [predictions()[k] for k in order], mask[list(order)]
    )
    torch.testing.assert_close(turned, plain[list(order)])


def test_entropy_is_nats_in_the_mean_over_tokens_that_anyone_has() -> None:
    mask = ALL.clone()
    mask[:, 0], mask[2, 1] = 0, 0
    weights = FixedFusion([1.0, 1.0, 2.0])(student_kv(), predictions(), mask)
    of_two, of_three = math.log(2), 0.5 * math.log(4) + 0.5 * math.log(2)
    assert float(entropy(weights)) == pytest.approx((of_two + of_three) / 2)
    assert float(entropy(torch.zeros(3, 1, 1, 1))) == 0


def test_one_sided_weights_have_a_finite_gradient() -> None:
    scores = torch.tensor([0.0, -math.inf, 200.0])[:, None, None, None].requires_grad_()
    weights = masked_softmax(scores, torch.tensor([1, 1, 1])[:, None, None])
    entropy(weights).backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_fused_targets_are_weighted_means() -> None:
    kv = [torch.randn(STUDENT, dtype=torch.float64) for _ in range(3)]
    weights = torch.rand(3, LAYERS, SAMPLES, TOKENS, dtype=torch.float64)
    fused = fuse(weights, kv)
    expected = sum(weights[k, 1, 2, 3] * kv[k][1, 0, 2, 1, 3, 2] for k in range(3))
    assert float(fused[1, 0, 2, 1, 3, 2]) == pytest.approx(float(expected))


def test_token_rows_hold_keys_before_values_head_by_head() -> None:
    kv = student_kv()
    assert torch.equal(token_rows(kv)[1, 2, 3], kv[1, :, 2, :, 3].flatten())
