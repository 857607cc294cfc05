"""Streamed CKA against its definition on all tokens at once."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.align.cka import CKAMatrix, LinearCKA
from kvpipe.kvcache.layout import token_features
from torch import Tensor

STUDENT, TEACHER = (2, 3, 4), (3, 2, 5)
"""Layers, heads and channels."""


def reference_cka(x: Tensor, y: Tensor) -> float:
    """Kornblith et al. (2019), equation 3, on all tokens at once."""
    a, b = (side.double().numpy() - side.double().numpy().mean(0) for side in (x, y))
    return float(np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)))


def streamed_cka(x: Tensor, y: Tensor, size: int) -> float:
    cka = LinearCKA()
    for part_x, part_y in zip(x.split(size), y.split(size), strict=True):
        cka.update(part_x, part_y)
    return cka.value()


def related_features(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 6, generator=generator) + 5
    return x, x @ torch.randn(6, 9, generator=generator) + 2 * torch.randn(200, 9, generator=generator) - 3


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_streamed_cka_is_that_of_all_tokens_at_once(size: int) -> None:
    x, y = related_features()
    expected = reference_cka(x, y)
    assert 0.1 < expected < 0.95
    assert streamed_cka(x, y, size) == pytest.approx(expected, rel=1e-9)


def test_cka_is_one_for_rotated_scaled_and_shifted_features() -> None:
    x, _ = related_features()
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    assert streamed_cka(x, 3.5 * x @ rotation + 10, 32) == pytest.approx(1, abs=1e-5)


def test_cka_of_unrelated_features_is_near_zero() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(5000, 4, generator=generator), torch.randn(5000, 4, generator=generator)
    assert streamed_cka(x, y, 500) < 0.01


def test_cka_of_features_that_never_vary_is_zero() -> None:
    x, _ = related_features()
    assert streamed_cka(x, torch.ones(200, 3), 50) == pytest.approx(0, abs=1e-9)


def test_token_features_are_the_real_tokens_heads_side_by_side() -> None:
    kv = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    expected = [kv[b, :, t].flatten() for b in range(2) for t in range(4) if mask[b, t]]
    assert torch.equal(token_features(kv, mask), torch.stack(expected))


def batch(seed: int, samples: int = 6, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Two caches of layers that have more or less to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    kv = [
        torch.randn(layers, 2, samples, heads, tokens, channels, generator=generator) + 3
        for layers, heads, channels in (STUDENT, TEACHER)
    ]
    kv[1][1, :, :, :, :, :4] += kv[0][0, :, :, :2]
    kv[1][2, 0, :, :, :, 1:] -= 2 * kv[0][1, 0, :, 1:]
    mask = (torch.rand(samples, tokens, generator=generator) < 0.8).long()
    return kv[0], kv[1], mask


def matrix_of(student: Tensor, teacher: Tensor, mask: Tensor, size: int) -> CKAMatrix:
    matrix = CKAMatrix()
    for start in range(0, len(mask), size):
        rows = slice(start, start + size)
        matrix.update(student[:, :, rows], teacher[:, :, rows], mask[rows])
    return matrix


def test_token_features_of_all_layers_are_those_of_each() -> None:
    kv, _, mask = batch(seed=0)
    found = token_features(kv, mask)
    for layer, kind in product(range(len(kv)), range(2)):
        assert torch.equal(found[layer, kind], token_features(kv[layer, kind], mask))


@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrix_holds_the_cka_of_every_pair_of_layers(size: int, dtype: torch.dtype) -> None:
    student, teacher, mask = batch(seed=0)
    teacher = teacher.to(dtype)
    matrix = matrix_of(student, teacher, mask, size)
    by_kind = matrix.by_kind()
    assert by_kind.shape == (2, STUDENT[0], TEACHER[0])
    for kind, i, j in product(range(2), range(STUDENT[0]), range(TEACHER[0])):
        x, y = token_features(student[i, kind], mask), token_features(teacher[j, kind], mask)
        assert float(by_kind[kind, i, j]) == pytest.approx(reference_cka(x, y), rel=1e-9)
    assert torch.equal(matrix.value(), (by_kind[0] + by_kind[1]) / 2)


@given(st.integers(0, 9), st.lists(st.integers(0, 6), max_size=3))
def test_the_matrix_does_not_depend_on_the_batches(seed: int, edges: list[int]) -> None:
    student, teacher, mask = batch(seed)
    split = CKAMatrix()
    for start, end in pairwise([0, *sorted(edges), 6]):
        split.update(student[:, :, start:end], teacher[:, :, start:end], mask[start:end])
    whole = matrix_of(student, teacher, mask, 6)
    torch.testing.assert_close(split.by_kind(), whole.by_kind(), rtol=1e-10, atol=1e-12)


def test_the_matrix_of_a_cache_with_itself_has_ones_on_its_diagonal() -> None:
    student, _, mask = batch(seed=1)
    torch.testing.assert_close(
        matrix_of(student, student, mask, 6).by_kind().diagonal(dim1=1, dim2=2), torch.ones(2, 2).double()
    )


def test_masked_tokens_do_not_count() -> None:
    student, teacher, mask = batch(seed=2)
    expected = matrix_of(student, teacher, mask, 6).value()
    for kv in (student, teacher):
        kv.masked_fill_(mask[None, None, :, None, :, None] == 0, float("nan"))
    assert torch.equal(matrix_of(student, teacher, mask, 6).value(), expected)


def test_layers_that_never_vary_and_batches_without_tokens_have_no_similarity() -> None:
    student, teacher, mask = batch(seed=3)
    teacher[1, 0] = 0.1
    found = matrix_of(student, teacher, mask, 4).by_kind()
    assert torch.equal(found[0, :, 1], torch.zeros(2).double())
    assert (found[1] > 0).all()
    assert torch.equal(matrix_of(student, teacher, torch.zeros_like(mask), 4).value(), torch.zeros(2, 3).double())


def test_gradients_do_not_pile_up_in_the_matrix() -> None:
    student, teacher, mask = batch(seed=4)
    matrix = matrix_of(student.requires_grad_(), teacher, mask, 3)
    assert not matrix.value().requires_grad
