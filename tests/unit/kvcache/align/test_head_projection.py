"""All projections against loops over single numbers, their sizes, and their starts."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from kvpipe.kvcache.align.closed_form import nearest_kronecker
from kvpipe.kvcache.align.head_projection import (
    BottleneckProjection,
    FlatProjection,
    KVSpace,
    LinearProjection,
    StructuredProjection,
)
from torch import Tensor, nn

LAYERS, BATCH, TOKENS = 2, 2, 3

# (source, target): grouped to fewer, to more, heads that do not divide, MQA on either side, one of each.
SPACES = [
    (KVSpace(4, 3), KVSpace(2, 5)),
    (KVSpace(2, 5), KVSpace(4, 3)),
    (KVSpace(3, 4), KVSpace(5, 4)),
    (KVSpace(1, 6), KVSpace(4, 2)),
    (KVSpace(4, 2), KVSpace(1, 6)),
    (KVSpace(1, 1), KVSpace(1, 1)),
]


def random_kv(space: KVSpace, seed: int = 0, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, 2, batch, space.num_kv_heads, TOKENS, space.head_dim, generator=generator)


def structured(
    source: KVSpace,
    target: KVSpace,
    *,
    share: bool = True,
    uniform: bool = False,
    terms: int = 1,
    layers: int = LAYERS,
    seed: int = 1,
) -> StructuredProjection:
    torch.manual_seed(seed)
    start = "uniform" if uniform else "random"
    projection = StructuredProjection(layers, source, target, share_dim_proj=share, terms=terms, start=start)
    nn.init.normal_(projection.bias)
    return projection


def flat(
    source: KVSpace, target: KVSpace, *, rank: int | None = None, layers: int = LAYERS, seed: int = 1
) -> FlatProjection:
    torch.manual_seed(seed)
    projection = FlatProjection(layers, source, target, rank)
    nn.init.normal_(projection.bias)
    return projection


KINDS = {
    "shared": lambda s, t: structured(s, t),
    "per-head": lambda s, t: structured(s, t, share=False),
    "three terms": lambda s, t: structured(s, t, terms=3),
    "per-head, two terms": lambda s, t: structured(s, t, share=False, terms=2),
    "flat": lambda s, t: flat(s, t),
    "low rank": lambda s, t: flat(s, t, rank=2),
    "structured, one for all layers": lambda s, t: structured(s, t, layers=1),
    "flat, one for all layers": lambda s, t: flat(s, t, layers=1),
}
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


def entry(
    projection: LinearProjection, layer: int, kind: int, source: KVSpace, row: tuple[int, int], column: tuple[int, int]
) -> float:
    """One number of a layer's matrix, from the parameters: from (head, channel) to (head, channel)."""
    layer = min(layer, len(projection.bias) - 1)
    (h, d), (g, e) = row, column
    if isinstance(projection, StructuredProjection):
        shared = projection.dim_proj.shape[3] == 1
        mixers, maps = projection.head_mixer[layer, kind], projection.dim_proj[layer, kind, :, 0 if shared else h]
        return sum(mixers[r, g, h].item() * maps[r, d, e].item() for r in range(len(mixers)))
    assert isinstance(projection, FlatProjection)
    first, *rest = [factor[layer, kind].double() for factor in projection.factors]
    matrix = first @ rest[0] if rest else first
    return matrix[h * source.head_dim + d, g * projection.target.head_dim + e].item()


def reference(projection: LinearProjection, kv: Tensor, source: KVSpace, target: KVSpace) -> Tensor:
    """`[L, 2, B, H_out, T, D_out]` in float64, one output number at a time."""
    values = kv.double()
    out = torch.zeros(LAYERS, 2, kv.shape[2], target.num_kv_heads, TOKENS, target.head_dim, dtype=torch.float64)
    for layer, kind, sample, head, token, channel in product(*map(range, out.shape)):
        total = projection.bias[min(layer, len(projection.bias) - 1), kind, head * target.head_dim + channel].item()
        for h, d in product(range(source.num_kv_heads), range(source.head_dim)):
            weight = entry(projection, layer, kind, source, (h, d), (head, channel))
            total += weight * values[layer, kind, sample, h, token, d].item()
        out[layer, kind, sample, head, token, channel] = total
    return out


@pytest.mark.parametrize(("source", "target"), SPACES)
@ALL_KINDS
def test_a_projection_is_what_the_loop_says(kind: str, source: KVSpace, target: KVSpace) -> None:
    projection, kv = KINDS[kind](source, target), random_kv(source)
    found = projection(kv)
    assert found.shape == (LAYERS, 2, BATCH, target.num_kv_heads, TOKENS, target.head_dim)
    torch.testing.assert_close(found.double(), reference(projection, kv, source, target), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), SPACES)
def test_parameter_counts(source: KVSpace, target: KVSpace) -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    h_in, d_in, h_out, d_out = source.num_kv_heads, source.head_dim, target.num_kv_heads, target.head_dim
    per_layer_and_kind = 2 * LAYERS
    assert count(structured(source, target)) == per_layer_and_kind * (d_in * d_out + h_in * h_out + h_out * d_out)
    assert count(structured(source, target, share=False)) == per_layer_and_kind * (
        h_in * d_in * d_out + h_in * h_out + h_out * d_out
    )
    assert count(flat(source, target)) == per_layer_and_kind * (h_in * d_in * h_out * d_out + h_out * d_out)


def test_more_terms_and_less_rank_have_their_own_counts() -> None:
    source, target = KVSpace(3, 4), KVSpace(2, 5)
    bias = LAYERS * 2 * target.features
    count = lambda module: sum(p.numel() for p in module.parameters()) - bias  # noqa: E731
    assert count(structured(source, target, terms=3)) == 3 * count(structured(source, target))
    assert count(flat(source, target, rank=2)) == LAYERS * 2 * 2 * (source.features + target.features)
    assert sum(p.numel() for p in flat(source, target, layers=1).parameters()) == 2 * (12 * 10 + 10)


def test_equal_maps_per_head_are_a_shared_map() -> None:
    source, target = KVSpace(3, 4), KVSpace(2, 5)
    shared, per_head = structured(source, target), structured(source, target, share=False)
    with torch.no_grad():
        per_head.dim_proj.copy_(shared.dim_proj.expand_as(per_head.dim_proj))
        per_head.head_mixer.copy_(shared.head_mixer)
        per_head.bias.copy_(shared.bias)
    kv = random_kv(source)
    torch.testing.assert_close(per_head(kv), shared(kv))


@ALL_KINDS
def test_a_start_from_a_map_of_the_same_kind_is_that_map(kind: str) -> None:
    source, target = KVSpace(3, 4), KVSpace(2, 5)
    original, other = KINDS[kind](source, target), KINDS[kind](source, target)
    other.start_from(original.matrix().detach(), original.bias.detach())
    torch.testing.assert_close(other(random_kv(source)), original(random_kv(source)), rtol=1e-4, atol=1e-4)


def test_a_start_is_the_nearest_of_its_kind() -> None:
    source, target = KVSpace(3, 4), KVSpace(2, 5)
    weight = torch.randn(LAYERS, 2, 12, 10, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(LAYERS, 2, 10)
    lowest = flat(source, target, rank=2)
    lowest.start_from(weight, bias)
    singular = torch.linalg.svdvals(weight)
    missed = (lowest.matrix() - weight).square().sum((-1, -2))
    torch.testing.assert_close(missed, singular[..., 2:].square().sum(-1), rtol=1e-4, atol=1e-4)
    one_term = structured(source, target)
    one_term.start_from(weight, bias)
    mixer, maps = nearest_kronecker(weight, 3, 2, 1)
    expected = torch.einsum("lkrgh,lkrde->lkhdge", mixer, maps).reshape(LAYERS, 2, 12, 10)
    torch.testing.assert_close(one_term.matrix(), expected)


def test_enough_terms_hold_every_flat_map() -> None:
    source, target = KVSpace(3, 4), KVSpace(2, 5)
    outer = flat(source, target)
    for inner in (structured(source, target, terms=6), structured(source, target, share=False, terms=2)):
        inner.start_from(outer.matrix().detach(), outer.bias.detach())
        torch.testing.assert_close(inner(random_kv(source)), outer(random_kv(source)), rtol=1e-4, atol=1e-4)


def test_a_bottleneck_is_a_normed_mlp_a_layer() -> None:
    source, target = KVSpace(3, 4), KVSpace(2, 5)
    torch.manual_seed(0)
    projection = BottleneckProjection(LAYERS, source, target, 7)
    for parameter in projection.parameters():
        nn.init.normal_(parameter)
    kv = random_kv(source)
    found = projection(kv)
    for layer, kind in product(range(LAYERS), range(2)):
        rows = kv[layer, kind].transpose(1, 2).flatten(2)
        weight = {name: parameter[layer, kind] for name, parameter in projection.named_parameters()}
        normed = F.layer_norm(rows, (12,), weight["layernorm_weight"], weight["layernorm_bias"])
        hidden = F.silu(normed @ weight["down"] + weight["down_bias"])
        expected = (hidden @ weight["up"] + weight["bias"]).unflatten(2, (2, 5)).transpose(1, 2)
        torch.testing.assert_close(found[layer, kind], expected, rtol=1e-4, atol=1e-4)


def test_init_uniform_starts_at_the_mean_of_the_heads() -> None:
    source, target = KVSpace(4, 3), KVSpace(2, 3)
    torch.manual_seed(0)
    projection = StructuredProjection(LAYERS, source, target, start="uniform")
    assert torch.equal(projection.head_mixer, torch.full((LAYERS, 2, 1, 2, 4), 0.25))
    kv = random_kv(source)
    mean = kv.mean(dim=3, keepdim=True) @ projection.dim_proj[:, :, 0, 0, None, None]
    torch.testing.assert_close(projection(kv), mean.expand(-1, -1, -1, 2, -1, -1))


def test_a_random_start_keeps_the_scale_of_its_input() -> None:
    source, target = KVSpace(8, 64), KVSpace(8, 64)
    torch.manual_seed(0)
    for projection in (
        StructuredProjection(LAYERS, source, target),
        StructuredProjection(LAYERS, source, target, terms=4),
        FlatProjection(LAYERS, source, target),
        FlatProjection(LAYERS, source, target, rank=64),
    ):
        assert float(projection(random_kv(source)).detach().std()) == pytest.approx(1, rel=0.25)


@ALL_KINDS
def test_samples_and_tokens_are_mapped_one_by_one(kind: str) -> None:
    source, target = KVSpace(3, 4), KVSpace(2, 5)
    projection, kv = KINDS[kind](source, target), random_kv(source, batch=5)
    order, tokens = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 0, 1])
    out = projection(kv)
    torch.testing.assert_close(projection(kv[:, :, order]), out[:, :, order])
    torch.testing.assert_close(projection(kv[..., tokens, :]), out[..., tokens, :])


@pytest.mark.parametrize("kind", ["structured", "flat"])
def test_layers_keys_and_values_have_their_own_weights(kind: str) -> None:
    source, target = KVSpace(3, 4), KVSpace(2, 5)
    projection = structured(source, target) if kind == "structured" else flat(source, target)
    kv = random_kv(source).requires_grad_()
    projection(kv)[1, 0].sum().backward()
    for parameter in projection.parameters():
        assert parameter.grad is not None
        touched = parameter.grad.flatten(2).abs().sum(2) > 0
        assert touched.tolist() == [[False, False], [True, False]]
