"""Items come in their order, errors as they were, and no thread stays."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.pipeline.read_ahead import ReadAhead


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("kvpipe-reader")]


def failing(good: int) -> Iterator[int]:
    yield from range(good)
    raise OSError("the disk is gone")


@given(items=st.lists(st.one_of(st.none(), st.integers())))
def test_every_item_comes_once_and_in_order(items: list[int | None]) -> None:
    before = set(reader_threads())
    assert list(ReadAhead(iter(items))) == items
    assert set(reader_threads()) <= before


def test_the_next_item_is_fetched_before_it_is_asked_for() -> None:
    fetched = threading.Semaphore(0)

    def source() -> Iterator[int]:
        for item in range(3):
            fetched.release()
            yield item

    ahead = ReadAhead(source())
    assert next(ahead) == 0
    assert fetched.acquire(timeout=10)
    assert fetched.acquire(timeout=10), "the second item is fetched though only one was asked for"
    assert not fetched.acquire(timeout=0.05), "no more than one item is held"


def test_waiting_is_counted_and_work_in_between_is_not() -> None:
    ready = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        ready.wait(10)
        yield 1

    ahead = ReadAhead(source())
    assert next(ahead) == 0
    before = ahead.waited
    threading.Timer(0.2, ready.set).start()
    assert next(ahead) == 1
    assert ahead.waited - before > 0.15
    before = ahead.waited
    time.sleep(0.2)
    assert list(ahead) == []
    assert ahead.waited - before < 0.1


def test_a_reader_on_one_core_leaves_all_others_to_the_rest() -> None:
    def source() -> Iterator[int]:
        yield torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(ReadAhead(source())) == [2]
        assert list(ReadAhead(source(), single_core=True)) == [1]
        assert torch.get_num_threads() == 2
        assert list(ReadAhead(source())) == [2], "nor do later threads start with fewer"
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_where_its_item_would_have() -> None:
    ahead = ReadAhead(failing(2))
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_the_thread_ends_with_an_iterator_that_is_left_half_way() -> None:
    before = set(reader_threads())
    ahead = ReadAhead(iter(range(100)))
    assert next(ahead) == 0
    (thread,) = set(reader_threads()) - before
    del ahead
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()
