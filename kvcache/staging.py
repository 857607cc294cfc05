"""Copy captured KV out of the model's memory, straight into the bytes of a shard's chunks.

The one copy that has to be made is also the change of layout: what comes out is written as it is, once every
chunk has its checksum in the room left behind it (see `shard`).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from .shard import ShardLayout

Pairs = list[tuple[Tensor, Tensor]]
"""Key and value `[B, H, T, D]` of every layer."""


class Staging:
    """A buffer in page-locked or plain memory, reused from batch to batch: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def fill(
        self, pairs: Pairs, layout: ShardLayout, lengths: Int[Tensor, " B"]
    ) -> tuple[Shaped[Tensor, "B blocks items"], Bool[Tensor, " B"]]:
        """The records of a batch: for every sample its token blocks, a chunk each with room for the checksum; and
        which samples are finite, all through their `lengths` tokens.

        From a GPU the copies go on after the return, on the current stream. The records lie in this buffer, so they
        are valid until the next `fill`.
        """
        first = pairs[0][0]
        batch, _, tokens, _ = first.shape
        shape = (batch, layout.blocks_of(tokens), layout.record_bytes // first.itemsize)
        records = self._memory(math.prod(shape), first).view(shape)
        if not first.is_cuda:
            _lay_out(pairs, records, layout)
            return records, _finite(pairs, lengths)
        # Laid out on the GPU, so that what crosses the bus is one contiguous copy.
        laid_out = torch.empty(shape, dtype=first.dtype, device=first.device)
        _lay_out(pairs, laid_out, layout)
        records.copy_(laid_out, non_blocking=True)
        return records, _finite(pairs, lengths).to("cpu", non_blocking=True)

    def _memory(self, items: int, like: Tensor) -> Tensor:
        if len(self._buffer) < items or self._buffer.dtype != like.dtype:
            self._buffer = torch.empty(items, dtype=like.dtype, pin_memory=like.is_cuda)
        return self._buffer[:items]


def _finite(pairs: Pairs, lengths: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """NaN and infinity survive every sum, and a sum reads its numbers only once."""
    sums = torch.stack([tensor.sum((1, 3), dtype=torch.float32) for pair in pairs for tensor in pair])
    real = torch.arange(sums.shape[2], device=sums.device) < lengths.to(sums.device)[:, None]
    return (sums.isfinite() | ~real).all(2).all(0)


def _lay_out(pairs: Pairs, records: Tensor, layout: ShardLayout) -> None:
    num_layers, _, _, *head_shape = layout.chunk_shape
    chunks = records[..., : math.prod(layout.chunk_shape)].unflatten(-1, (num_layers, 2, *head_shape))
    for layer, pair in enumerate(pairs):
        for kind, tensor in enumerate(pair):
            _cut_into_blocks(tensor, chunks[:, :, layer, kind])


def _cut_into_blocks(tensor: Shaped[Tensor, "B H T D"], chunks: Shaped[Tensor, "B blocks H block D"]) -> None:
    block = chunks.shape[3]
    whole, rest = divmod(tensor.shape[2], block)
    if whole:
        chunks[:, :whole].copy_(tensor[:, :, : whole * block].unflatten(2, (whole, block)).transpose(1, 2))
    if rest:
        chunks[:, whole, :, :rest].copy_(tensor[:, :, whole * block :])
