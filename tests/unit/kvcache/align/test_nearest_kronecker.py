"""The nearest sums of Kronecker products against their definition, random others and another solver."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from kvpipe.kvcache.align.closed_form import nearest_kronecker
from torch import Tensor

SPACES = [((4, 3), (2, 5)), ((2, 5), (4, 3)), ((1, 6), (4, 2)), ((4, 2), (1, 6)), ((3, 1), (1, 4)), ((1, 1), (1, 1))]


def kronecker_sum(mixers: Tensor, maps: Tensor) -> Tensor:
    """`[L, 2, F, G]` from the factors, one entry at a time."""
    layers, kinds, terms, h_out, h_in = mixers.shape
    d_in, d_out = maps.shape[3:]
    out = torch.zeros(layers, kinds, h_in * d_in, h_out * d_out, dtype=mixers.dtype)
    for layer, kind, r, g, h, d, e in product(*map(range, (layers, kinds, terms, h_out, h_in, d_in, d_out))):
        entry = mixers[layer, kind, r, g, h] * maps[layer, kind, r, d, e]
        out[layer, kind, h * d_in + d, g * d_out + e] += entry
    return out


@pytest.mark.parametrize(("source", "target"), SPACES)
@pytest.mark.parametrize("more", [0, 2])
def test_all_terms_give_the_weight_itself(source: tuple[int, int], target: tuple[int, int], more: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 2, source[0] * source[1], target[0] * target[1], generator=generator, dtype=torch.float64)
    terms = min(source[0] * target[0], source[1] * target[1]) + more
    mixers, maps = nearest_kronecker(weight, source[0], target[0], terms)
    assert mixers.shape == (2, 2, terms, target[0], source[0])
    assert maps.shape == (2, 2, terms, source[1], target[1])
    torch.testing.assert_close(kronecker_sum(mixers, maps), weight)
    assert float(mixers[:, :, terms - more :].abs().sum()) == 0
    torch.testing.assert_close(mixers.flatten(3).norm(dim=3), maps.flatten(3).norm(dim=3))


def test_each_term_comes_nearer_and_none_of_that_many_is_nearer() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1, 2, 4 * 3, 2 * 5, generator=generator, dtype=torch.float64)
    errors = []
    for terms in range(1, 9):
        mixers, maps = nearest_kronecker(weight, 4, 2, terms)
        errors.append(float((kronecker_sum(mixers, maps) - weight).norm()))
        for size in (1e-3, 1e-1):
            other = [part + size * torch.randn(part.shape, generator=generator).double() for part in (mixers, maps)]
            assert float((kronecker_sum(*other) - weight).norm()) > errors[-1]
    assert all(b < a for a, b in pairwise(errors))
    assert errors[-1] == pytest.approx(0, abs=1e-9)


def test_one_term_is_found_again_by_alternating_least_squares() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(1, 2, 3 * 4, 2 * 3, generator=generator, dtype=torch.float64)
    expected = kronecker_sum(*nearest_kronecker(weight, 3, 2, 1))
    for kind in range(2):
        blocks = weight[0, kind].view(3, 4, 2, 3)
        mixer = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        for _ in range(500):
            channel_map = torch.einsum("hdge,hg->de", blocks, mixer) / mixer.square().sum()
            mixer = torch.einsum("hdge,de->hg", blocks, channel_map) / channel_map.square().sum()
        found = torch.einsum("hg,de->hdge", mixer, channel_map).reshape(12, 6)
        torch.testing.assert_close(found, expected[0, kind], rtol=1e-6, atol=1e-8)


def test_a_weight_of_nothing_but_zeros_has_factors_of_zeros() -> None:
    mixers, maps = nearest_kronecker(torch.zeros(1, 2, 6, 4), 2, 2, 2)
    assert float(mixers.abs().sum() + maps.abs().sum()) == 0
