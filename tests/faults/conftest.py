"""What machines do to stores and runs, done on purpose. A few points of each in `make test`, all in `make test-faults`.

Every fault is drawn from a seed. What was tried, and what came of it, is counted and printed at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

COUNTS = ("tried", "injected", "detected", "lost")


class Tally:
    """Counts of one kind of fault: points tried, faults that really struck, those noticed, and samples lost."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._node = request.node

    def add(self, kind: str, **counts: int) -> None:
        """`tally.add("bit flips", tried=100, injected=100, detected=100, lost=0)`"""
        assert set(counts) <= set(COUNTS)
        self._node.user_properties.append(("faults", (kind, counts)))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    return Tally(request)


@pytest.fixture(scope="session")
def points(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """`points(quick, full)`: how many faults to try in this run."""
    full = pytestconfig.getoption("--faults") == "full"
    return lambda quick, whole: whole if full else quick


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    table: dict[str, Counter[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if name == "faults" and report.when == "call":
                    table.setdefault(value[0], Counter()).update(value[1])
    if table:
        terminalreporter.section("faults")
        terminalreporter.line(f"| fault | {' | '.join(COUNTS)} |\n|---|{'---|' * len(COUNTS)}")
        for kind, counts in sorted(table.items()):
            terminalreporter.line(f"| {kind} | {' | '.join(str(counts[name]) for name in COUNTS)} |")
