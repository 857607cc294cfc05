"""Read samples back: their KV, and the queries that lie beside it, each without the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from .chunk_reader import ChunkReader
from .errors import StoreError
from .layout import KV, STORAGE_DTYPES, from_storage, to_storage
from .part import KV_POSITION, QUERIES
from .recycled import RecycledMemory
from .store import KVStore


class KVReader:
    """Random access to the samples of a complete store.

    Opens a shard at first use. Nothing reaches the caller that does not match the ledger: damage raises
    StoreError naming the shard and the sample.
    """

    def __init__(self, store: KVStore) -> None:
        store.require_complete()
        self.store = store
        self._memory = RecycledMemory()
        block = store.geometry.bytes_per_token * store.layout.block
        self._kv = ChunkReader(store, [name for name in store.parts if name != QUERIES], block)
        self._queries = ChunkReader(store, [QUERIES]) if QUERIES in store.parts else None
        self._positions = ChunkReader(store, [KV_POSITION]) if store.evicts else None

    def read(self, indices: Sequence[int], num_tokens: int | None = None) -> KV:
        """KV `[L, 2, B, H, T, D]` of the samples at `indices`, in the store's logical dtype.

        T is `num_tokens`, by default the most that a sample keeps; tokens past a sample's last are zero.
        """
        return self.read_with_positions(indices, num_tokens)[0]

    def read_with_positions(
        self, indices: Sequence[int], num_tokens: int | None = None
    ) -> tuple[KV, Int[Tensor, "B T"] | None]:
        """As `read`, and of a store that evicts tokens the position in its sample of every one that was kept, -1 past
        the last; else None."""
        geometry, lengths, width = self.store.geometry, *self._lengths(indices, num_tokens)
        positions = torch.full((len(lengths), width), -1) if self.store.evicts else None
        chunks = self._decoded(indices, lengths, positions)
        kv = self._side_by_side(chunks, 2 * geometry.num_layers, geometry.num_kv_heads, lengths, width)
        return kv.unflatten(0, (geometry.num_layers, 2)), positions

    def read_positions(self, indices: Sequence[int]) -> Int[Tensor, "B T"] | None:
        """The positions that `read_with_positions` gives, without reading any KV."""
        if self._positions is None:
            return None
        lengths, width = self._lengths(indices, None)
        positions, blocks = torch.full((len(lengths), width), -1), self._blocks(lengths)
        for rows, (part,) in self._positions.read(indices, blocks):
            _place(positions, rows, part, lengths, blocks)
        return positions

    def read_queries(self, indices: Sequence[int], num_tokens: int | None = None) -> Shaped[Tensor, "L B Hq T D"]:
        """The queries of the tokens that `read` gives the KV of, at the same places, times the attention's scale.

        Raises StoreError for a store without them.
        """
        if self._queries is None:
            raise StoreError(
                f"{self.store.path} has no queries",
                expected="a store that keeps them",
                found="KV alone",
                remedy="Extract again with --queries",
            )
        geometry, lengths, width = self.store.geometry, *self._lengths(indices, num_tokens)
        parts = self._queries.read(indices, self._blocks(lengths))
        chunks = ((rows, part.view(geometry.dtype)) for rows, (part,) in parts)
        return self._side_by_side(chunks, geometry.num_layers, geometry.num_query_heads, lengths, width)

    def close(self) -> None:
        """Close all file handles."""
        for reader in (self._kv, self._queries, self._positions):
            if reader is not None:
                reader.close()

    def _lengths(self, indices: Sequence[int], num_tokens: int | None) -> tuple[list[int], int]:
        """Tokens to read of every sample, and those that there is room for."""
        kept = [int(self.store.kv_length[index]) for index in indices]
        width = max(kept) if num_tokens is None else num_tokens
        return [min(length, width) for length in kept], width

    def _blocks(self, lengths: Sequence[int]) -> list[int]:
        return [self.store.layout.blocks_of(length) for length in lengths]

    def _decoded(
        self, indices: Sequence[int], lengths: Sequence[int], positions: Int[Tensor, "B T"] | None
    ) -> Iterator[tuple[range, Shaped[Tensor, "N planes H block D"]]]:
        """Rows, a few at a time, and the token blocks of their KV; `positions` are filled on the way."""
        blocks = self._blocks(lengths)
        for rows, parts in self._kv.read(indices, blocks):
            if positions is not None:
                _place(positions, rows, parts.pop(), lengths, blocks)
            yield rows, self.store.codec.decode(parts, self.store.dtype).flatten(1, 2)

    def _side_by_side(
        self,
        chunks: Iterable[tuple[range, Shaped[Tensor, "N planes H block D"]]],
        planes: int,
        heads: int,
        lengths: Sequence[int],
        width: int,
    ) -> Shaped[Tensor, "planes B H T D"]:
        """One array of the token blocks of samples of these `lengths`, zero up to `width` tokens."""
        geometry, grid = self.store.geometry, self.store.layout
        sample = (heads, grid.blocks_of(width), grid.block, geometry.head_dim)
        cut = self._memory.empty((planes, len(lengths), *sample), np.dtype(STORAGE_DTYPES[geometry.dtype]))
        out = cut.reshape(*cut.shape[:3], -1, geometry.head_dim)
        for rows, found in chunks:
            # NumPy's small copies cost half of what torch's do.
            stored, first = to_storage(found), 0
            for row in rows:
                last = first + grid.blocks_of(lengths[row])
                cut[:, row, :, : last - first] = stored[first:last].transpose(1, 2, 0, 3, 4)
                out[:, row, :, lengths[row] :] = 0
                first = last
        return from_storage(out, geometry.dtype)[..., :width, :]


def _place(
    positions: Int[Tensor, "B T"],
    rows: range,
    part: Int[Tensor, "N block"],
    lengths: Sequence[int],
    blocks: Sequence[int],
) -> None:
    """Into `positions`, the stored ones of some rows: token blocks, one after the other."""
    for row, stored in zip(rows, part.split([blocks[row] for row in rows]), strict=True):
        positions[row, : lengths[row]] = stored.flatten()[: lengths[row]]
