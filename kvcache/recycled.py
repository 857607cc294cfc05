"""Memory for batches that comes back when the last tensor over it is gone: fresh pages cost more than what is written
into them."""

from __future__ import annotations

import math
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_FREE = 4
"""Blocks kept for reuse: batches read ahead, and the one that is computed on."""


class RecycledMemory:
    """Arrays of any shape, in blocks of memory that are used again once nobody refers to them any more."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self._lock = Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array whose content is what memory happens to hold."""
        size = math.prod(shape) * dtype.itemsize
        lease = _Lease(self._take(size), self._free)
        return np.asarray(lease)[:size].view(dtype).reshape(shape)

    def _take(self, size: int) -> NDArray[np.uint8]:
        with self._lock:
            del self._free[:-MOST_FREE]
            fitting = [place for place, block in enumerate(self._free) if len(block) >= size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda place: len(self._free[place])))
        # Larger than asked for: batches differ in length, and their blocks should fit the next.
        return np.empty(size + size // 4, np.uint8)


class _Lease:
    """What all arrays over a block have as their base: NumPy lets go of it with the last of them."""

    def __init__(self, block: NDArray[np.uint8], free: list[NDArray[np.uint8]]) -> None:
        self._block, self._free = block, free
        self.__array_interface__ = block.__array_interface__

    def __del__(self) -> None:
        # Without the lock, for this may run at any moment; appending is one step.
        self._free.append(self._block)
