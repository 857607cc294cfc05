"""Both projections against loops over single numbers, their sizes, and their starts."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from kvpipe.kvcache.align.head_projection import FlatProjection, KVSpace, StructuredProjection
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
    source: KVSpace, target: KVSpace, *, share: bool = True, uniform: bool = False, seed: int = 1
) -> StructuredProjection:
    torch.manual_seed(seed)
    projection = StructuredProjection(LAYERS, source, target, share_dim_proj=share, init_uniform=uniform)
    nn.init.normal_(projection.bias)
    return projection


def flat(source: KVSpace, target: KVSpace, seed: int = 1) -> FlatProjection:
    torch.manual_seed(seed)
    projection = FlatProjection(LAYERS, source, target)
    nn.init.normal_(projection.bias)
    return projection


def reference(projection: nn.Module, kv: Tensor, source: KVSpace, target: KVSpace) -> Tensor:
    """`[L, 2, B, H_out, T, D_out]` in float64, one output number at a time."""
    values = kv.double()
    out = torch.zeros(LAYERS, 2, kv.shape[2], target.num_kv_heads, TOKENS, target.head_dim, dtype=torch.float64)
    bias = projection.bias.double()
    for layer, kind, sample, head, token, channel in product(*map(range, out.shape)):
        total = bias[layer, kind, 0, head, 0, channel].item()
        for h, d in product(range(source.num_kv_heads), range(source.head_dim)):
            if isinstance(projection, StructuredProjection):
                shared = projection.dim_proj.shape[2] == 1
                weight = projection.head_mixer[layer, kind, head, h].item()
                weight *= projection.dim_proj[layer, kind, 0 if shared else h, d, channel].item()
            else:
                row, column = h * source.head_dim + d, head * target.head_dim + channel
                weight = projection.weight[layer, kind, row, column].item()
            total += weight * values[layer, kind, sample, h, token, d].item()
        out[layer, kind, sample, head, token, channel] = total
    return out


@pytest.mark.parametrize(("source", "target"), SPACES)
@pytest.mark.parametrize("kind", ["shared", "per-head", "flat"])
def test_a_projection_is_what_the_loop_says(kind: str, source: KVSpace, target: KVSpace) -> None:
    projection = flat(source, target) if kind == "flat" else structured(source, target, share=kind == "shared")
    kv = random_kv(source)
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


def test_equal_maps_per_head_are_a_shared_map() -> None:
    source, target = KVSpace(3, 4), KVSpace(2, 5)
    shared, per_head = structured(source, target), structured(source, target, share=False)
    with torch.no_grad():
        per_head.dim_proj.copy_(shared.dim_proj.expand_as(per_head.dim_proj))
        per_head.head_mixer.copy_(shared.head_mixer)
        per_head.bias.copy_(shared.bias)
    kv = random_kv(source)
    torch.testing.assert_close(per_head(kv), shared(kv))


def test_flat_holds_every_structured_map() -> None:
    source, target = KVSpace(3, 4), KVSpace(2, 5)
    inner, outer = structured(source, target, share=False), flat(source, target)
    with torch.no_grad():
        weight = torch.einsum("lkgh,lkhde->lkhdge", inner.head_mixer, inner.dim_proj)
        outer.weight.copy_(weight.reshape(LAYERS, 2, source.features, target.features))
        outer.bias.copy_(inner.bias)
    kv = random_kv(source)
    torch.testing.assert_close(outer(kv), inner(kv), rtol=1e-4, atol=1e-5)


def test_init_uniform_starts_at_the_mean_of_the_heads() -> None:
    source, target = KVSpace(4, 3), KVSpace(2, 3)
    torch.manual_seed(0)
    projection = StructuredProjection(LAYERS, source, target, share_dim_proj=True, init_uniform=True)
    assert torch.equal(projection.head_mixer, torch.full((LAYERS, 2, 2, 4), 0.25))
    kv = random_kv(source)
    mean = kv.mean(dim=3, keepdim=True) @ projection.dim_proj[:, :, None]
    torch.testing.assert_close(projection(kv), mean.expand(-1, -1, -1, 2, -1, -1))


def test_a_random_start_keeps_the_scale_of_its_input() -> None:
    source, target = KVSpace(8, 64), KVSpace(8, 64)
    torch.manual_seed(0)
    for projection in (
        StructuredProjection(LAYERS, source, target, share_dim_proj=True, init_uniform=False),
        FlatProjection(LAYERS, source, target),
    ):
        assert float(projection(random_kv(source)).detach().std()) == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize("kind", ["structured", "flat"])
def test_samples_and_tokens_are_mapped_one_by_one(kind: str) -> None:
    source, target = KVSpace(3, 4), KVSpace(2, 5)
    projection = structured(source, target) if kind == "structured" else flat(source, target)
    kv = random_kv(source, batch=5)
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
