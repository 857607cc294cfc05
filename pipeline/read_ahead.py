"""The next batch is read while the current one is computed on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Thread
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """The items of `source`, in its order, each fetched by a thread before it is asked for.

    One item is held at most; `waited` counts the seconds that were spent waiting for one. An error of `source` is
    raised, as it was, where its item would have come. The thread ends with the items, with an error, or with this
    object. With `single_core` torch computes on one core in it: for where others are busy on all of them.
    """

    def __init__(self, source: Iterator[T], *, single_core: bool = False) -> None:
        self.source = source
        self.waited = 0.0
        start = _compute_on_one_core if single_core else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvpipe-reader", initializer=start)
        self._next = self._thread.submit(_one, source)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            items = self._next.result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        self.waited += time.perf_counter() - start
        if not items:
            self._thread.shutdown()
            raise StopIteration
        self._next = self._thread.submit(_one, self.source)
        return items[0]


def _compute_on_one_core() -> None:
    """Of this thread alone: torch keeps the number for every thread that has one, and gives new ones the last that was
    set, which is therefore set again in a thread that ends."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    last = Thread(target=torch.set_num_threads, args=(cores,))
    last.start()
    last.join()


def _one(source: Iterator[T]) -> list[T]:
    """The next item, or none: a StopIteration cannot cross from a thread as it is."""
    return list(islice(source, 1))
