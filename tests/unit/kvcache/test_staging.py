"""Captured KV is cut into token blocks without losing or moving a single value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.layout import STORAGE_DTYPES
from kvpipe.kvcache.shard import ShardLayout
from kvpipe.kvcache.staging import Staging


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 11),
    block=st.integers(1, 5),
    transposed=st.booleans(),
    dtype=st.sampled_from(list(STORAGE_DTYPES)),
)
def test_every_value_finds_its_block(
    batch: int, heads: int, tokens: int, block: int, transposed: bool, dtype: torch.dtype
) -> None:
    """Also from `[B, T, H, D]` memory, as attention layers leave it."""
    num_layers, head_dim = 2, 3
    layout = ShardLayout(num_layers, heads, head_dim, block, 1, -(-tokens // block), np.dtype(STORAGE_DTYPES[dtype]))
    count = num_layers * 2 * batch * heads * tokens * head_dim
    kv = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    kv = kv.view(num_layers, 2, batch, heads, tokens, head_dim)
    if transposed:
        kv = kv.transpose(3, 4).contiguous().transpose(3, 4)
    records, finite = Staging().fill([(key, value) for key, value in kv], layout, torch.full((batch,), tokens))
    assert finite.all()
    assert records.view(torch.uint8).shape == (batch, layout.blocks, layout.record_bytes)
    for b in range(batch):
        for blk in range(layout.blocks):
            chunk = records[b, blk].view(torch.uint8)[: layout.chunk_bytes].view(dtype).view(layout.chunk_shape)
            part = kv[:, :, b, :, blk * block : (blk + 1) * block]
            assert torch.equal(chunk[:, :, 0, :, : part.shape[3]], part)


def test_the_buffer_is_reused() -> None:
    layout = ShardLayout(1, 1, 2, 4, 1, 2, np.dtype(np.float32))
    staging = Staging()
    first, _ = staging.fill([(torch.ones(2, 1, 8, 2), torch.ones(2, 1, 8, 2))], layout, torch.tensor([8, 8]))
    second, _ = staging.fill([(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2))], layout, torch.tensor([5]))
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_one_number_that_is_none_is_seen_and_padding_does_not_count(dtype: torch.dtype, bad: float) -> None:
    layout = ShardLayout(2, 2, 3, 4, 1, 2, np.dtype(STORAGE_DTYPES[dtype]))
    lengths = torch.tensor([5, 8, 3])
    for index in np.ndindex(2, 2, 3, 2, 8, 3):
        layer, kind, sample, head, token, channel = index
        kv = torch.full((2, 2, 3, 2, 8, 3), torch.finfo(dtype).max / 64, dtype=dtype)
        kv[layer, kind, sample, head, token, channel] = bad
        _, finite = Staging().fill([(key, value) for key, value in kv], layout, lengths)
        assert finite.tolist() == [row != sample or token >= lengths[row] for row in range(3)]
