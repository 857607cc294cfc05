"""Closed-form maps against float64 solvers on all tokens at once, and their optimality against random others."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.align.closed_form import (
    RIDGE_ALPHA,
    GramMoments,
    closed_form,
    head_r2,
    mean_squared_error,
    pca,
    procrustes,
    r2,
    ridge,
)
from kvpipe.kvcache.layout import token_features
from torch import Tensor

LAYERS, SAMPLES, TOKENS = 2, 6, 20
X, Y = (2, 3), (2, 4)
"""Heads and channels of either side."""

EACH = list(product(range(LAYERS), range(2)))
"""Every layer's key and value."""


def pair(
    seed: int = 0, x_space: tuple[int, int] = X, y_space: tuple[int, int] = Y, noise: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Two caches, the second an affine map of the first but for noise, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    (heads, channels), (y_heads, y_channels) = x_space, y_space
    x = torch.randn(LAYERS, 2, SAMPLES, heads, TOKENS, channels, generator=generator)
    x = x * torch.linspace(0.5, 2, channels) + 3
    weight = torch.randn(LAYERS, 2, heads, channels, y_heads, y_channels, generator=generator)
    y = torch.einsum("lkbhtd,lkhdge->lkbgte", x, weight) - 1
    y = y + noise * torch.randn(y.shape, generator=generator)
    return x, y, (torch.rand(SAMPLES, TOKENS, generator=generator) < 0.8).long()


def moments_of(x: Tensor, y: Tensor, mask: Tensor, edges: Iterable[int] = ()) -> GramMoments:
    moments = GramMoments()
    for start, end in pairwise([0, *sorted(edges), len(mask)]):
        moments.update(x[:, :, start:end], y[:, :, start:end], mask[start:end])
    return moments


def rows(kv: Tensor, mask: Tensor, layer: int, kind: int) -> Tensor:
    return token_features(kv[layer, kind], mask).double()


def least_squares(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Ridge as least squares over the tokens and a row for every feature, by LAPACK."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    penalty = alpha * (x - mean_x).square().mean() * len(x)
    stacked = torch.cat([x - mean_x, penalty.sqrt() * torch.eye(x.shape[1]).double()])
    target = torch.cat([y - mean_y, torch.zeros(x.shape[1], y.shape[1]).double()])
    weight = torch.linalg.lstsq(stacked, target, driver="gelsd").solution
    return weight, mean_y - mean_x @ weight


@pytest.mark.parametrize("constant", [False, True])
def test_the_mean_squared_error_is_that_of_the_tokens(constant: bool) -> None:
    """Also of an output that never varies, whose R2 says nothing."""
    x, y, mask = pair()
    if constant:
        y[..., 0] = 7.0
    generator = torch.Generator().manual_seed(1)
    features = [side.shape[3] * side.shape[5] for side in (x, y)]
    weight = torch.randn(LAYERS, 2, *features, generator=generator).double()
    bias = torch.randn(LAYERS, 2, features[1], generator=generator).double()
    found = mean_squared_error(weight, bias, moments_of(x, y, mask))
    for layer, kind in EACH:
        wrong = rows(x, mask, layer, kind) @ weight[layer, kind] + bias[layer, kind] - rows(y, mask, layer, kind)
        torch.testing.assert_close(found[layer, kind], wrong.square().mean(0))


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ridge_is_penalised_least_squares(alpha: float, dtype: torch.dtype) -> None:
    x, y, mask = pair()
    x, y = x.to(dtype), y.to(dtype)
    weight, bias = ridge(moments_of(x, y, mask), alpha)
    for layer, kind in EACH:
        expected = least_squares(rows(x, mask, layer, kind), rows(y, mask, layer, kind), alpha)
        torch.testing.assert_close(weight[layer, kind], expected[0], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(bias[layer, kind], expected[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.0, 1e-3])
def test_ridge_of_dependent_and_constant_features_is_that_of_least_norm(alpha: float) -> None:
    x, y, mask = pair()
    x = x.double()
    x[..., 1, :, 0] = 2 * x[..., 0, :, 0] + 7
    x[..., 1, :, 1] = 0.1
    weight, bias = ridge(moments_of(x, y, mask), alpha)
    for layer, kind in EACH:
        expected = least_squares(rows(x, mask, layer, kind), rows(y, mask, layer, kind), alpha)
        torch.testing.assert_close(weight[layer, kind], expected[0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(bias[layer, kind], expected[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_fewer_tokens_than_features_give_a_finite_map_through_the_mean(kept: int) -> None:
    x, y, _ = pair()
    mask = torch.zeros(SAMPLES, TOKENS, dtype=torch.long)
    mask[0, :kept] = 1
    moments = moments_of(x, y, mask)
    for weight, bias in (ridge(moments), procrustes(moments), pca(moments, 4)):
        assert torch.isfinite(weight).all()
        assert torch.isfinite(bias).all()
    weight, bias = ridge(moments)
    for layer, kind in EACH if kept else ():
        mean = rows(x, mask, layer, kind).mean(0) @ weight[layer, kind] + bias[layer, kind]
        torch.testing.assert_close(mean, rows(y, mask, layer, kind).mean(0), rtol=1e-9, atol=1e-9)
    if kept <= 1:
        assert torch.equal(weight, torch.zeros_like(weight))
        assert torch.equal(r2(weight, bias, moments), torch.zeros_like(bias))


@given(st.integers(0, 9), st.lists(st.integers(0, SAMPLES), max_size=4))
def test_maps_do_not_depend_on_the_batches(seed: int, edges: list[int]) -> None:
    x, y, mask = pair(seed)
    split, whole = moments_of(x, y, mask, edges), moments_of(x, y, mask)
    assert split.count == whole.count == int(mask.sum())
    for method in ("ridge", "procrustes", "pca"):
        for found, expected in zip(closed_form(method, split), closed_form(method, whole), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_masked_tokens_do_not_count() -> None:
    x, y, mask = pair()
    expected = ridge(moments_of(x, y, mask))
    for kv in (x, y):
        kv.masked_fill_(mask[None, None, :, None, :, None] == 0, float("nan"))
    for found, wanted in zip(ridge(moments_of(x, y, mask)), expected, strict=True):
        assert torch.equal(found, wanted)


def test_pooled_moments_are_those_of_all_layers_tokens() -> None:
    x, y, mask = pair()
    pooled = moments_of(x, y, mask).pooled()
    long_x, long_y = (kv.transpose(0, 1).flatten(1, 2)[None] for kv in (x, y))
    together = moments_of(long_x, long_y, mask.repeat(LAYERS, 1))
    assert pooled.count == together.count
    for found, expected in zip(ridge(pooled), ridge(together), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("x_space", "y_space"), [((2, 3), (2, 4)), ((2, 4), (2, 3)), ((1, 5), (5, 1))])
def test_procrustes_is_semi_orthogonal_and_agrees_better_than_any_other(
    x_space: tuple[int, int], y_space: tuple[int, int]
) -> None:
    x, y, mask = pair(0, x_space, y_space)
    weight, bias = procrustes(moments_of(x, y, mask))
    generator = torch.Generator().manual_seed(1)
    size = min(weight.shape[-2:])
    gram = weight @ weight.mT if weight.shape[-2] == size else weight.mT @ weight
    torch.testing.assert_close(gram, torch.eye(size).double().expand_as(gram))
    for layer, kind in EACH:
        a, b = rows(x, mask, layer, kind), rows(y, mask, layer, kind)
        torch.testing.assert_close((a @ weight[layer, kind] + bias[layer, kind]).mean(0), b.mean(0))
        cross = (a - a.mean(0)).T @ (b - b.mean(0))
        agreement = float((weight[layer, kind] * cross).sum())
        assert agreement == pytest.approx(float(torch.linalg.svdvals(cross).sum()))
        for _ in range(50):
            wide = torch.randn(max(cross.shape), size, generator=generator, dtype=torch.float64)
            other = torch.linalg.qr(wide).Q
            other = other if other.shape == cross.shape else other.T
            assert float((other * cross).sum()) < agreement


def test_procrustes_finds_a_rotation_again() -> None:
    x, _, mask = pair()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).Q
    y = (x.transpose(3, 4).flatten(4) @ rotation + 5).unflatten(4, X).transpose(3, 4)
    moments = moments_of(x, y, mask)
    weight, bias = procrustes(moments)
    torch.testing.assert_close(weight, rotation.double().expand_as(weight), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(r2(weight, bias, moments), torch.ones_like(bias), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 6, 9])
def test_pca_keeps_the_directions_of_most_variance(rank: int) -> None:
    x, y, mask = pair()
    weight, bias = pca(moments_of(x, y, mask), rank)
    for layer, kind in EACH:
        a = rows(x, mask, layer, kind)
        out = a @ weight[layer, kind] + bias[layer, kind]
        _, scale, right = torch.linalg.svd(a - a.mean(0), full_matrices=False)
        variance = scale.square() / len(a)
        size = min(rank, 6)
        unit = (variance[:size].sum() / rank).rsqrt()
        torch.testing.assert_close(out.mean(0), torch.zeros(rank).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(out.var(0, correction=0)[:size], variance[:size] * unit**2)
        assert float(out.var(0, correction=0).mean()) == pytest.approx(1)
        cosine = (weight[layer, kind, :, :size] * right[:size].T).sum(0).abs() / unit
        torch.testing.assert_close(cosine, torch.ones(size).double(), rtol=1e-6, atol=1e-6)
        assert torch.equal(weight[layer, kind, :, size:], torch.zeros(6, rank - size).double())


def test_pca_of_features_that_never_vary_is_their_mean() -> None:
    x, y, mask = pair()
    x[0, 1] = 0.1
    weight, bias = pca(moments_of(x, y, mask), 4)
    out = rows(x, mask, 0, 1) @ weight[0, 1] + bias[0, 1]
    torch.testing.assert_close(out, torch.zeros_like(out), rtol=0, atol=1e-9)


def test_closed_form_names_the_methods() -> None:
    moments = moments_of(*pair())
    expected = {"ridge": ridge(moments, RIDGE_ALPHA), "procrustes": procrustes(moments), "pca": pca(moments, 8)}
    for method, maps in expected.items():
        for found, wanted in zip(closed_form(method, moments), maps, strict=True):  # type: ignore[arg-type]
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("seed", [0, 5])
def test_r2_is_that_of_the_tokens_whether_they_were_fitted_or_held_out(seed: int) -> None:
    weight, bias = ridge(moments_of(*pair(0)))
    x, y, mask = pair(seed)
    found = r2(weight.float(), bias.float(), moments_of(x, y, mask))
    for layer, kind in EACH:
        a, b = rows(x, mask, layer, kind), rows(y, mask, layer, kind)
        residual = b - a @ weight[layer, kind].float().double() - bias[layer, kind].float().double()
        expected = 1 - residual.square().sum(0) / (b - b.mean(0)).square().sum(0)
        torch.testing.assert_close(found[layer, kind], expected, rtol=1e-9, atol=1e-9)
    assert (found > 0.5).all() if seed == 0 else (found < 0).any()


def test_r2_is_zero_for_the_mean_and_for_outputs_that_never_vary() -> None:
    x, y, mask = pair()
    y[:, :, :, 1, :, 2] = 0.1
    moments = moments_of(x, y, mask)
    weight, bias = ridge(moments)
    assert torch.equal(r2(weight, bias, moments)[..., 6], torch.zeros(LAYERS, 2).double())
    mean = moments.covariance().mean_y
    nothing = r2(torch.zeros_like(weight), mean, moments)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing))


def test_the_r2_of_a_head_is_the_mean_of_its_channels() -> None:
    channels = torch.arange(2 * 2 * 6.0).view(2, 2, 6)
    found = head_r2(channels, 3)
    for layer, kind, head in product(range(2), range(2), range(3)):
        assert float(found[layer, kind, head]) == float(channels[layer, kind, 2 * head : 2 * head + 2].mean())
