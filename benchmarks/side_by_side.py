"""Time two or more things in turn, A B A B ..., and compare them pair by pair: the machine's drift cancels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.progress import Progress


@dataclass(frozen=True)
class Ratio:
    """One claim: `name` is a ratio of measured seconds (or a share), with the aim it is held against."""

    name: str
    median: float
    low: float
    high: float
    runs: int
    aim: float

    @property
    def row(self) -> str:
        """A Markdown table row."""
        met = "yes" if self.median <= self.aim else "no"
        spread = f"{self.low:.3f}-{self.high:.3f}"
        return f"| {self.name} | **{self.median:.3f}** | {spread} | {self.runs} | <= {self.aim:.3g} | {met} |"


HEADER = "| claim | median | range | runs | aim | met |\n|---|---|---|---|---|---|"


def quiet() -> Progress:
    """A progress bar that shows nothing, so that it costs nothing."""
    return Progress(console=Console(quiet=True))


def alternate(timed: Mapping[str, Callable[[], float]], runs: int) -> list[dict[str, float]]:
    """Seconds of each thing in each round; a first round is a warm-up and does not count."""
    rounds = [{name: measure() for name, measure in timed.items()} for _ in range(runs + 1)]
    return rounds[1:]


def ratio(name: str, rounds: list[dict[str, float]], over: str, under: str, aim: float) -> Ratio:
    """`over / under`, round by round."""
    return of_values(name, [r[over] / r[under] for r in rounds], aim)


def of_values(name: str, values: list[float], aim: float) -> Ratio:
    return Ratio(name, median(values), min(values), max(values), len(values), aim)
