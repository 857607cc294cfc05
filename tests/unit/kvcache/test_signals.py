"""A signal that comes in the middle is neither lost nor early."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from kvpipe.kvcache.signals import deferred_signals


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Shells start what runs in the background with interruptions ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_waits_for_the_end() -> None:
    done = []

    def work() -> None:
        with deferred_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_signal_nothing_changes() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with deferred_signals():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_error_within_is_raised_as_it_was() -> None:
    with pytest.raises(ValueError, match="own"), deferred_signals():
        raise ValueError("own")


def test_another_thread_may_use_it() -> None:
    entered = []

    def work() -> None:
        with deferred_signals():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]
