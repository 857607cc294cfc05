"""Copy captured KV out of the model's memory, straight into the bytes of a shard's chunks.

Kept raw, the one copy that has to be made is also the change of layout: what comes out is written as it is, once
every chunk has its checksum in the room left behind it (see `shard`). A codec encodes on the device that holds the KV,
so that only the small form crosses the bus.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from torch import Tensor

from .codec import Codec, Scaled
from .layout import Pairs
from .shard import ShardLayout

Records = list[UInt8[Tensor, "B blocks _"]]
"""For every part of a store, a batch's token blocks: a chunk each with room for its checksum."""


class Staging:
    """Buffers in page-locked or plain memory, reused from batch to batch: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def fill(
        self,
        pairs: Pairs,
        codec: Codec,
        layouts: Mapping[str, ShardLayout],
        lengths: Int[Tensor, " B"],
        positions: Int[Tensor, "B T"] | None = None,
        queries: Sequence[Shaped[Tensor, "B Hq T D"]] | None = None,
    ) -> tuple[Records, Bool[Tensor, " B"]]:
        """The records of a batch, and which samples are finite, all through their `lengths` tokens and in their scales.
        Where tokens were evicted, `positions` are those of the rest; `queries` of every layer go beside the KV as they
        are.

        Past a sample's end its last token is repeated, so that it changes no scale; raw KV and queries are zero there.
        From a GPU the copies go on after the return, on the current stream. The records are valid until the next
        `fill`.
        """
        first = pairs[0][0]
        blocks = layouts["kv"].blocks_of(first.shape[2])
        records = [
            self._memory(name, (len(first), blocks, layout.record_bytes), torch.uint8, pinned=first.is_cuda)
            for name, layout in layouts.items()
        ]
        # Laid out on the GPU, so that what crosses the bus is one contiguous copy a part.
        targets = [torch.empty_like(part, device=first.device) for part in records] if first.is_cuda else records
        rooms = [part[..., : layout.chunk_bytes] for part, layout in zip(targets, layouts.values(), strict=True)]
        if queries is not None:
            _lay_out_queries(queries, rooms.pop(), lengths.tolist())
        if positions is not None:
            _lay_out_positions(positions, rooms.pop())
        finite = finite_samples(chain(*pairs, queries or []), lengths)
        if isinstance(codec, Scaled):
            finite &= self._encode(pairs, codec, rooms, layouts["kv"].block, lengths.tolist())
        else:
            chunks = rooms[0].view(first.dtype).unflatten(-1, _chunk_shape(pairs, layouts["kv"].block))
            _lay_out(pairs, chunks)
            _clear_past_end(chunks, lengths.tolist())
        if not first.is_cuda:
            return records, finite
        for part, target in zip(records, targets, strict=True):
            part.copy_(target, non_blocking=True)
        return records, finite.to("cpu", non_blocking=True)

    def _encode(
        self, pairs: Pairs, codec: Scaled, rooms: Sequence[Tensor], block: int, lengths: list[int]
    ) -> Bool[Tensor, " B"]:
        first, shape = pairs[0][0], _chunk_shape(pairs, block)
        chunks = self._memory("laid out", (*rooms[0].shape[:2], *shape), first.dtype, device=first.device)
        # Blocks that a shorter sample of the batch does not reach are encoded too, and written nowhere.
        _lay_out(pairs, chunks)
        for chunk, past_end in _last_tokens(chunks, lengths):
            chunk[..., past_end:, :] = chunk[..., past_end - 1 : past_end, :]
        encoded = [part.unflatten(0, chunks.shape[:2]) for part in codec.encode(chunks.flatten(0, 1))]
        for room, part in zip(rooms, encoded, strict=True):
            room.copy_(part.flatten(2).contiguous().view(torch.uint8))
        blocks = torch.arange(chunks.shape[1]) * block < torch.tensor(lengths)[:, None]
        return (encoded[1].isfinite().all(2) | ~blocks.to(first.device)).all(1)

    def _memory(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        pinned: bool = False,
    ) -> Tensor:
        size, buffer = math.prod(shape), self._buffers.get(name)
        if buffer is None or len(buffer) < size or buffer.dtype != dtype or buffer.is_pinned() != pinned:
            # Zeros: what a first batch leaves of its blocks is numbers, too.
            buffer = torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


def finite_samples(tensors: Iterable[Shaped[Tensor, "B _ T D"]], lengths: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Which samples have no NaN and no infinity in their `lengths` tokens of any tensor."""
    # They survive every sum, and a sum reads its numbers only once.
    sums = torch.stack([tensor.sum((1, 3), dtype=torch.float32) for tensor in tensors])
    real = torch.arange(sums.shape[2], device=sums.device) < lengths.to(sums.device)[:, None]
    return (sums.isfinite() | ~real).all(2).all(0)


def _chunk_shape(pairs: Pairs, block: int) -> tuple[int, int, int, int, int]:
    _, heads, _, head_dim = pairs[0][0].shape
    return (len(pairs), 2, heads, block, head_dim)


def _last_tokens(
    chunks: Shaped[Tensor, "B blocks *planes H block D"], lengths: list[int]
) -> list[tuple[Shaped[Tensor, "*planes H block D"], int]]:
    """The last block of every sample that does not fill it, and the place in it after the sample's end."""
    ends = [divmod(length, chunks.shape[-2]) for length in lengths]
    return [(chunks[row, blk], past_end) for row, (blk, past_end) in enumerate(ends) if past_end]


def _clear_past_end(chunks: Shaped[Tensor, "B blocks *planes H block D"], lengths: list[int]) -> None:
    for chunk, past_end in _last_tokens(chunks, lengths):
        chunk[..., past_end:, :] = 0


def _lay_out_queries(
    queries: Sequence[Shaped[Tensor, "B Hq T D"]], room: UInt8[Tensor, "B blocks _"], lengths: list[int]
) -> None:
    _, heads, _, head_dim = queries[0].shape
    chunks = room.view(queries[0].dtype).unflatten(-1, (len(queries), heads, -1, head_dim))
    for layer, tensor in enumerate(queries):
        _cut_into_blocks(tensor, chunks[:, :, layer])
    _clear_past_end(chunks, lengths)


def _lay_out_positions(positions: Int[Tensor, "B T"], room: UInt8[Tensor, "B blocks _"]) -> None:
    places = torch.full((len(room), room[0].numel() // 4), -1, dtype=torch.int32, device=room.device)
    places[:, : positions.shape[1]] = positions
    room.copy_(places.view(torch.uint8).view(room.shape))


def _lay_out(pairs: Pairs, chunks: Shaped[Tensor, "B blocks L 2 H block D"]) -> None:
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
