"""The arrays that hold KV, and what goes with it token by token, are cut alike and written together: a chunk each for
every token block of a sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .layout import STORAGE_DTYPES, KVGeometry
from .shard import ShardLayout


@dataclass(frozen=True)
class Part:
    """One of these arrays: the shape of a chunk, which is one token block of one sample, and its axes."""

    chunk: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: tuple[str, ...]
    fill: int = 0
    """What a chunk that is not there reads as."""

    @property
    def content_shape(self) -> tuple[int, ...]:
        """The shape of a chunk without its axes of one sample and one block."""
        return tuple(size for axis, size in zip(self.axes, self.chunk, strict=True) if axis not in ("sample", "block"))

    def grid(self, samples: int, blocks: int) -> tuple[int, ...]:
        """The shape of an array of so many samples of so many blocks each."""
        shape = list(self.chunk)
        shape[self.axes.index("sample")] = samples
        shape[self.axes.index("token" if "token" in self.axes else "block")] *= blocks
        return tuple(shape)

    def layout(self, block: int, samples: int, blocks: int) -> ShardLayout:
        """Of a shard of so many samples of at most so many blocks of `block` tokens."""
        return ShardLayout(self.chunk, self.dtype, block, samples, blocks)

    def shard_path(self, array: Path, shard: int) -> Path:
        """The file of a shard: its place in the grid is 0 along all axes but that of the samples."""
        return array.joinpath("c", *(str(shard) if axis == "sample" else "0" for axis in self.axes))


KV_POSITION = "kv_position"
QUERIES = "queries"


def positions_part(block: int) -> Part:
    """`kv_position`: where in its sample every kept token was, -1 past the last."""
    return Part((1, block), np.dtype("<i4"), ("sample", "token"), fill=-1)


def queries_part(geometry: KVGeometry, block: int) -> Part:
    """`queries`: those of the tokens whose KV is kept, the model's own numbers whatever the codec."""
    chunk = (geometry.num_layers, 1, geometry.num_query_heads, block, geometry.head_dim)
    dtype = np.dtype(STORAGE_DTYPES[geometry.dtype]).newbyteorder("<")
    return Part(chunk, dtype, ("layer", "sample", "head", "token", "channel"))
