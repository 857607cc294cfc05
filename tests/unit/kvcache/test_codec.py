"""Every codec gives back what it was given, as near as it says; the arrays it needs are what it fills."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.codec import CODECS, Integer, require_codec
from kvpipe.kvcache.errors import ConfigError
from kvpipe.kvcache.layout import STORAGE_DTYPES, KVGeometry, to_storage
from torch import Tensor

LOSSY = [name for name, codec in CODECS.items() if codec.lossy]


def chunks_of(seed: int, count: int = 3, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[N, L, 2, H, block, D]`, with means and scales of their own in every channel."""
    generator = torch.Generator().manual_seed(seed)
    channel = torch.randn(2, 2, 2, 1, 8, generator=generator) * 3
    return ((torch.randn(count, 2, 2, 2, 4, 8, generator=generator) + channel) * scale).to(dtype)


def groups(chunks: Tensor) -> list[tuple[Tensor, int]]:
    """Keys with the axis of a channel's tokens, values with that of a token's channels."""
    return [(chunks[:, :, 0], -2), (chunks[:, :, 1], -1)]


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("name", LOSSY)
def test_parts_are_what_is_encoded(name: str, dtype: torch.dtype) -> None:
    codec, chunks = CODECS[name], chunks_of(0, dtype=dtype)
    geometry = KVGeometry(2, 2, 8, dtype)
    parts = codec.parts(geometry, 4)
    assert next(iter(parts)) == "kv"
    assert codec.head_dim(codec.packed(8)) == 8
    for part, encoded in zip(parts.values(), codec.encode(chunks), strict=True):
        assert encoded.shape == (3, *part.content_shape)
        assert encoded.dtype.itemsize == part.dtype.itemsize
        assert np.prod(part.grid(5, 2)) == 10 * np.prod(part.chunk)
    decoded = codec.decode([part.contiguous() for part in codec.encode(chunks)], dtype)
    assert decoded.dtype == dtype
    assert decoded.shape == chunks.shape


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_raw_keeps_every_bit(dtype: torch.dtype) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    chunks = (bits if dtype != torch.float32 else bits.repeat_interleave(2)).view(dtype).view(-1, 1, 2, 1, 4, 8)
    stored = torch.from_numpy(to_storage(chunks))
    assert torch.equal(CODECS["raw"].decode([stored], dtype).view(torch.uint8), chunks.view(torch.uint8))


@given(seed=st.integers(0, 100), scale=st.sampled_from([1e-3, 1.0, 100.0]), bits=st.sampled_from([2, 3, 4, 8]))
def test_an_integer_code_is_off_by_half_a_step_at_most(seed: int, scale: float, bits: int) -> None:
    """A step is the group's span by the number of steps; rounding its two scales to float16 adds a little."""
    codec, chunks = Integer(bits), chunks_of(seed, scale=scale)
    decoded = codec.decode(codec.encode(chunks), torch.float32)
    for (given_, dim), (found, _) in zip(groups(chunks.double()), groups(decoded.double()), strict=True):
        low, high = given_.aminmax(dim=dim, keepdim=True)
        magnitude = torch.maximum(low.abs(), high.abs())
        step = (high - low + magnitude * 2**-10) / (2**bits - 1)
        assert ((found - given_).abs() <= 0.5 * step * (1 + 2**-9) + magnitude * 1e-6 + 2**-23).all()


@given(seed=st.integers(0, 100), scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_fp8_keeps_four_significant_bits(seed: int, scale: float) -> None:
    chunks = chunks_of(seed, scale=scale)
    decoded = CODECS["fp8"].decode(CODECS["fp8"].encode(chunks), torch.float32)
    for (given_, dim), (found, _) in zip(groups(chunks), groups(decoded), strict=True):
        least = given_.abs().amax(dim=dim, keepdim=True) / 448 * 2**-9
        assert ((found - given_).abs() <= given_.abs() * 2**-4 * 1.01 + least).all()


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.25, 100.0])
def test_a_group_of_equal_numbers_is_kept(name: str, value: float) -> None:
    chunks = torch.full((1, 1, 2, 1, 4, 8), value)
    decoded = CODECS[name].decode(CODECS[name].encode(chunks), torch.float32)
    assert (decoded - chunks).abs().max() <= abs(value) * 1e-3


def test_packed_codes_lie_where_the_documents_say() -> None:
    """The first channel in the lowest bits."""
    chunks = torch.arange(4.0).repeat(1, 1, 2, 1, 4, 2)
    codes, _ = CODECS["int2"].encode(chunks)
    assert codes[0, 0, 1, 0, 0].tolist() == [0b11100100, 0b11100100]
    codes, _ = CODECS["int4"].encode(torch.arange(8.0).repeat(1, 1, 2, 1, 4, 1) * 15 / 7)
    low, high = codes[0, 0, 1, 0, 0, 0] & 15, codes[0, 0, 1, 0, 0, 0] >> 4
    assert (int(low), int(high)) == (0, 2)
    codes, _ = CODECS["int3"].encode(torch.arange(8.0).repeat(1, 1, 2, 1, 4, 1))
    assert codes[0, 0, 1, 0, 0].tolist() == list(sum(code << 3 * code for code in range(8)).to_bytes(3, "little"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(seed=st.integers(0, 2**31))
def test_codes_are_unpacked_as_they_were_packed(bits: int, seed: int) -> None:
    codec, rng = Integer(bits), np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, 2**bits, (3, 2, 16), np.uint8))
    packed = codec._pack(codes)
    assert packed.shape == (3, 2, codec.packed(16))
    assert packed.dtype == torch.uint8
    assert torch.equal(codec._unpack(packed), codes)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_what_float16_cannot_scale_is_not_finite_in_its_scales(name: str, bad: float) -> None:
    chunks = chunks_of(0, count=2)
    chunks[1, 0, 0, 1, 2, 3] = bad
    scales = CODECS[name].encode(chunks)[1]
    assert scales[0].isfinite().all()
    assert not scales[1].isfinite().all()


def test_keys_of_an_outlying_channel_leave_the_others_alone() -> None:
    """Grouped by token, they would take all the codes: why keys are grouped by channel."""
    chunks = chunks_of(0)
    outlying = chunks.clone()
    outlying[:, :, 0, :, :, 3] *= 1000
    found = [CODECS["int4"].decode(CODECS["int4"].encode(c), torch.float32)[:, :, 0] for c in (chunks, outlying)]
    others = [channel for channel in range(8) if channel != 3]
    assert torch.equal(found[0][..., others], found[1][..., others])


@pytest.mark.parametrize(("name", "head_dim", "multiple"), [("int4", 5, 2), ("int3", 12, 8), ("int2", 6, 4)])
def test_a_head_that_cannot_be_packed_is_refused(name: str, head_dim: int, multiple: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"{name} cannot pack .* a multiple of {multiple}, found {head_dim}\. Choose"
    ):
        CODECS[name].parts(KVGeometry(1, 1, head_dim, torch.bfloat16), 32)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown codec: expected raw, fp8, int8, int4, int3, int2, found zip"):
        require_codec("zip")
