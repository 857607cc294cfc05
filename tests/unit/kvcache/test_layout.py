"""Caches and legacy tuples become one tensor; bfloat16 survives as uint16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from kvpipe.kvcache.errors import ModelError
from kvpipe.kvcache.layout import (
    LOGICAL_DTYPES,
    STORAGE_DTYPES,
    dtype_name,
    from_storage,
    layer_pairs,
    stack_past_kv,
    to_storage,
)
from transformers import AutoModelForCausalLM, DynamicCache

SHAPE = (2, 3, 5, 4)  # B, H, T, D


def random_pairs(num_layers: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)) for _ in range(num_layers)
    ]


def test_a_cache_and_both_legacy_tuples_stack_to_the_same_tensor() -> None:
    pairs = random_pairs()
    cache = DynamicCache()
    for layer, (key, value) in enumerate(pairs):
        cache.update(key, value, layer)
    stacked = stack_past_kv(cache)
    assert stacked.shape == (3, 2, *SHAPE)
    for layer, pair in enumerate(pairs):
        assert torch.equal(stacked[layer, 0], pair[0])
        assert torch.equal(stacked[layer, 1], pair[1])
    assert torch.equal(stack_past_kv(tuple(pairs)), stacked)
    assert torch.equal(stack_past_kv(tuple((key.numpy(), value.numpy()) for key, value in pairs)), stacked)


def test_pairs_of_a_cache_are_its_own_tensors() -> None:
    cache = DynamicCache()
    cache.update(*random_pairs(1)[0], 0)
    assert layer_pairs(cache)[0][0] is cache.layers[0].keys


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([(SHAPE, SHAPE), (SHAPE, (2, 3, 4, 4))], "(2, 3, 4, 4)"),
        ([(SHAPE, SHAPE), ((2, 1, 5, 4), (2, 1, 5, 4))], "(2, 1, 5, 4)"),
        ([(SHAPE, SHAPE), ((2, 3, 5, 8), (2, 3, 5, 8))], "(2, 3, 5, 8)"),
        ([((2, 3, 5), (2, 3, 5))], "(2, 3, 5)"),
        ([], "[]"),
    ],
    ids=["value unlike key", "heads", "head_dim", "three axes", "no layers"],
)
def test_unequal_layers_are_refused(shapes: list[tuple[tuple[int, ...], ...]], found: str) -> None:
    with pytest.raises(ModelError, match="does not fit one tensor") as refusal:
        stack_past_kv([(torch.zeros(key), torch.zeros(value)) for key, value in shapes])
    assert found in str(refusal.value)


def test_a_cache_with_unequal_layers_is_refused() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    cache.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), 1)
    with pytest.raises(ModelError, match=r"\(1, 2, 5, 8\).*\(1, 2, 5, 16\)"):
        stack_past_kv(cache)


def test_a_cache_with_linear_attention_layers_is_refused() -> None:
    config = transformers.Qwen3NextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=2, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=2,
        num_experts_per_tok=1, layer_types=["linear_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        cache = model(torch.arange(6)[None], use_cache=True).past_key_values
    with pytest.raises(ModelError, match="linear-attention"):
        stack_past_kv(cache)


def test_gradients_flow_through_the_stack() -> None:
    key = torch.ones(SHAPE, requires_grad=True)
    stack_past_kv([(key, torch.zeros(SHAPE))]).sum().backward()
    assert torch.equal(key.grad, torch.ones(SHAPE))


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=dtype_name)
def test_storage_keeps_every_bit_and_copies_nothing(dtype: torch.dtype) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)  # all bfloat16 and float16 values, NaNs too
    tensor = (bits if dtype != torch.float32 else bits.repeat_interleave(2)).view(dtype)
    stored = to_storage(tensor)
    restored = from_storage(stored, dtype)
    assert stored.dtype == STORAGE_DTYPES[dtype]
    assert restored.dtype == dtype
    assert np.array_equal(restored.view(torch.uint8).numpy(), tensor.view(torch.uint8).numpy())
    assert stored.ctypes.data == tensor.data_ptr() == restored.data_ptr()
    assert LOGICAL_DTYPES[dtype_name(dtype)] is dtype
