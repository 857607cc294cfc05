"""Rows of different lengths, end to end in memory, that read and write like a padded array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PaddedRows:
    """Rows of `length` `[B]` items each, which lie end to end in `items` `[N, ...]`, as an array `[B, width, ...]` with
    `fill` past every row's end. Runs of rows are read and written like those of an array; the whole is never made."""

    items: NDArray[Any]
    length: NDArray[np.int32]
    width: int
    fill: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.length), self.width, *self.items.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.items.dtype

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.length, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        places, real = self._places(rows)
        padded = np.full((*real.shape, *self.items.shape[1:]), self.fill, self.dtype)
        padded[real] = self.items[places]
        return padded

    def __setitem__(self, rows: slice, padded: NDArray[Any]) -> None:
        places, real = self._places(rows)
        self.items[places] = padded[real]

    def take(self, rows: Sequence[int]) -> NDArray[Any]:
        """Some rows in any order, padded to the longest of them."""
        padded = np.full((len(rows), int(self.length[rows].max()), *self.items.shape[1:]), self.fill, self.dtype)
        for place, row in enumerate(rows):
            padded[place, : self.length[row]] = self.items[self._bounds[row] : self._bounds[row + 1]]
        return padded

    def _places(self, rows: slice) -> tuple[slice, NDArray[np.bool_]]:
        """Of a run of rows: where their items are, and where they come in the padded array."""
        length = self.length[rows]
        first = rows.indices(len(self))[0]
        items = slice(self._bounds[first], self._bounds[first + len(length)])
        return items, np.arange(self.width) < length[:, None]
