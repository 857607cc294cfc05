"""What machines do to stores and runs, done on purpose. A few points of most in `make test`, all in `make test-faults`.

Every fault is drawn from a seed. What was tried, and what came of it, is counted and printed at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kvpipe.data.word_problems import generate
from kvpipe.pipeline.models import tokenizer_files
from kvpipe.pipeline.teacher_recipes import train_tokenizer

from .hostile_reader import Reader

EXTRACT = ["extract", "--model", "qwen", "--samples", "40", "--eval-samples", "4", "--batch-size", "8"]
EXTRACT += ["--max-shard-size", "400KB", "--store", "x.zarr"]

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


class Commands:
    """`kvpipe` in processes that can be told what is to go wrong."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("commands.py")
        self._server = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, argv: list[str], cwd: Path, **fault: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"argv": argv, "cwd": str(cwd), **fault}) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def finish(self, argv: list[str], cwd: Path) -> dict[str, Any]:
        """Run a command that has to succeed."""
        answer = self.run(argv, cwd)
        assert answer["code"] == 0, answer["output"]
        return answer

    def stop(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    server = Commands()
    yield server
    server.stop()


def contents(folder: Path, left_out: set[str]) -> dict[str, bytes]:
    """Every file by its path; with a `*` in `left_out`, whatever lies below."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if not any(Path(name).match(pattern) for pattern in left_out)}


HOSTILE_LENGTHS = [40, 5, 33, 64]
HOSTILE_DISTILL = ["distill", "--store", "x.zarr", "--mode", "flat", "--max-new-tokens", 2, "--output-dir", "run"]
HOSTILE_DISTILL += ["--batch-size", 1]


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    server = Reader()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def sound_store(make_store: Callable[..., Any]) -> Path:
    """A store of two shards, with a real tokenizer."""
    files = tokenizer_files(train_tokenizer(list(generate("train", 100, 0))))
    store, _ = make_store(HOSTILE_LENGTHS, tokenizer_files=files)
    return Path(store.path)


SLOW = {"test_hostile_input.py", "test_hostile_runs.py", "test_long_runs.py", "test_two_writers.py"}
"""Of these even a few points take long."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name in SLOW and config.getoption("--faults") == "quick" else None


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
