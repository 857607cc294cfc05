"""Memory that is used again, and never while somebody still looks at it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.recycled import MOST_FREE, RecycledMemory

FLOAT = np.dtype(np.float32)


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_once_the_last_view_is_gone() -> None:
    memory = RecycledMemory()
    array = memory.empty((3, 4), FLOAT)
    first = address(array)
    tensor = torch.from_numpy(array)[1:, ::2]
    del array
    assert address(memory.empty((3, 4), FLOAT)) != first
    del tensor
    assert first in {address(memory.empty((2, 6), FLOAT)), address(memory.empty((12,), FLOAT))}


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=30))
def test_no_two_living_arrays_share_memory(steps: list[tuple[int, bool]]) -> None:
    memory, living = RecycledMemory(), []
    for number, (size, drop) in enumerate(steps):
        tensor = torch.from_numpy(memory.empty((size, 2), FLOAT))
        tensor.fill_(number)
        living.append((number, tensor.view(-1)[::2]))
        if drop:
            living.pop(0)
        for value, kept in living:
            assert (kept == value).all()


def test_what_is_kept_is_bounded() -> None:
    memory = RecycledMemory()
    arrays = [memory.empty((size,), FLOAT) for size in range(1, 50)]
    del arrays
    memory.empty((1,), FLOAT)
    assert len(memory._free) == MOST_FREE
