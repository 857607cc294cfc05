"""The arrays that hold KV are cut alike, and written as one: a chunk each for every token block of a sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .shard import ShardLayout


@dataclass(frozen=True)
class Part:
    """One of the arrays that hold KV: the shape of a chunk, which is one token block of one sample, and its axes."""

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


def positions_part(block: int) -> Part:
    """`kv_position`: where in its sample every kept token was, -1 past the last."""
    return Part((1, block), np.dtype("<i4"), ("sample", "token"), fill=-1)
