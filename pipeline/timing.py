"""Time works in turn, A B A B: what a shared machine does meanwhile falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

PASSES = 3
"""After one that warms up memory, kernels and threads, and may be the first to bring files into memory."""


@dataclass(frozen=True)
class Timed:
    """Seconds of the first pass, and the median of those that followed."""

    first_seconds: float
    seconds: float


def in_turn(works: Sequence[Callable[[], None]], done: Callable[[], None] = lambda: None) -> list[Timed]:
    """What each of some works takes; `done` is called after every pass of every one."""
    rounds = [[_seconds(work, done) for work in works] for _ in range(PASSES + 1)]
    return [Timed(first, median(others)) for first, *others in zip(*rounds, strict=True)]


def _seconds(work: Callable[[], None], done: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done()
    return seconds
