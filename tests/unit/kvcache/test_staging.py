"""Captured KV is cut into token blocks without losing or moving a single value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.codec import CODECS, Codec
from kvpipe.kvcache.layout import STORAGE_DTYPES, KVGeometry
from kvpipe.kvcache.shard import ShardLayout
from kvpipe.kvcache.staging import Staging


def layouts_of(codec: Codec, geometry: KVGeometry, block: int = 4) -> dict[str, ShardLayout]:
    """Of shards of one sample of at most two blocks."""
    return {name: part.layout(block, 1, 2) for name, part in codec.parts(geometry, block).items()}


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
    parts = CODECS["raw"].parts(KVGeometry(num_layers, heads, head_dim, dtype), block)
    layout = parts["kv"].layout(block, 1, -(-tokens // block))
    count = num_layers * 2 * batch * heads * tokens * head_dim
    kv = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    kv = kv.view(num_layers, 2, batch, heads, tokens, head_dim)
    if transposed:
        kv = kv.transpose(3, 4).contiguous().transpose(3, 4)
    pairs, lengths = [(key, value) for key, value in kv], torch.full((batch,), tokens)
    (records,), finite = Staging().fill(pairs, CODECS["raw"], {"kv": layout}, lengths)
    assert finite.all()
    assert records.shape == (batch, layout.blocks, layout.record_bytes)
    for b in range(batch):
        for blk in range(layout.blocks):
            chunk = records[b, blk][: layout.chunk_bytes].view(dtype).view(layout.chunk_shape)
            part = kv[:, :, b, :, blk * block : (blk + 1) * block]
            assert torch.equal(chunk[:, :, 0, :, : part.shape[3]], part)


def test_the_buffer_is_reused() -> None:
    layouts = layouts_of(CODECS["raw"], KVGeometry(1, 1, 2, torch.float32))
    staging = Staging()
    full, part = torch.ones(2, 1, 8, 2), torch.zeros(1, 1, 5, 2)
    (first,), _ = staging.fill([(full, full)], CODECS["raw"], layouts, torch.tensor([8, 8]))
    (second,), _ = staging.fill([(part, part)], CODECS["raw"], layouts, torch.tensor([5]))
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_one_number_that_is_none_is_seen_and_padding_does_not_count(dtype: torch.dtype, bad: float) -> None:
    layouts = layouts_of(CODECS["raw"], KVGeometry(2, 2, 3, dtype))
    lengths = torch.tensor([5, 8, 3])
    for index in np.ndindex(2, 2, 3, 2, 8, 3):
        layer, kind, sample, head, token, channel = index
        kv = torch.full((2, 2, 3, 2, 8, 3), torch.finfo(dtype).max / 64, dtype=dtype)
        kv[layer, kind, sample, head, token, channel] = bad
        _, finite = Staging().fill([(key, value) for key, value in kv], CODECS["raw"], layouts, lengths)
        assert finite.tolist() == [row != sample or token >= lengths[row] for row in range(3)]


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if codec.lossy])
def test_what_lies_past_a_samples_end_changes_none_of_its_scales(name: str) -> None:
    codec, geometry = CODECS[name], KVGeometry(2, 2, 8, torch.bfloat16)
    layouts = layouts_of(codec, geometry)
    kv = torch.randn(2, 2, 1, 2, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16() + 5
    garbage = kv.clone()
    garbage[..., 6:, :] = float("nan")
    filled = []
    for content in (kv[..., :6, :], garbage):
        pairs = [(key, value) for key, value in content]
        records, finite = Staging().fill(pairs, codec, layouts, torch.tensor([6]))
        assert finite.all()
        filled.append([part[..., : layout.chunk_bytes] for part, layout in zip(records, layouts.values(), strict=True)])
    for one, other in zip(*filled, strict=True):
        assert torch.equal(one, other)


def test_a_scale_that_float16_cannot_hold_makes_its_sample_alone_not_finite() -> None:
    codec, geometry = CODECS["int8"], KVGeometry(1, 1, 4, torch.float32)
    kv = torch.ones(1, 2, 3, 1, 8, 4)
    kv[0, 1, 1, 0, 5, 2] = 1e6
    kv[0, 1, 2, 0, 5, 2] = 1e6
    pairs, lengths = [(key, value) for key, value in kv], torch.tensor([8, 8, 4])
    _, finite = Staging().fill(pairs, codec, layouts_of(codec, geometry), lengths)
    assert finite.tolist() == [True, False, True]
