"""Multi-step arithmetic word problems, generated: unlimited samples with no download.

A story starts with a number of things and changes it one sentence at a time; each sentence is one
calculation of the reasoning, which is bare ("15+7=22.") or, in the long style, has words around it. Some sentences
happen to the person in the story ("He buys 7 more."), others hand the story over to a second person ("Mia has 7 fewer
than Tom."), so a reader must follow who has what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Literal

from .sample import Sample

Style = Literal["short", "long"]
"""How much the reasoning says: the calculations alone, or who has how many after each of them as well."""

# How many of every ten problems fall to each split, by the hash of the prompt.
SPLIT_SHARES = {"train": 8, "validation": 1, "test": 1}

LARGEST_RESULT = 99
_LARGEST_TERM = 20
_FACTORS = range(2, 10)
_STEP_WEIGHTS = {1: 36, 2: 32, 3: 20, 4: 12}

_PRONOUNS = {
    **dict.fromkeys(("Tom", "Ben", "Sam", "Leo", "Max", "Ali", "Dan", "Jon", "Raj", "Otto"), "He"),
    **dict.fromkeys(("Mia", "Ana", "Eva", "Zoe", "Lily", "Kim", "Sara", "Nina", "Ruth", "Uma"), "She"),
}
_THINGS = (
    *("apples", "pens", "books", "coins", "cards", "shells", "eggs", "stamps"),
    *("toys", "cups", "rings", "beads", "nuts", "keys", "balls", "maps"),
    *("plums", "bricks", "flags", "kites", "jars", "leaves", "photos", "socks"),
)
_OPENINGS = ("{who} has {n} {things}.", "{who} finds {n} {things}.", "{who} starts with {n} {things}.")
_PACKED_OPENINGS = ("{who} has {m} bags of {n} {things}.", "{who} buys {m} boxes of {n} {things}.")
_QUESTIONS = (
    "How many {things} does {who} have?",
    "How many {things} has {who} now?",
    "How many does {who} have?",
)


@dataclass(frozen=True)
class _Operation:
    """One kind of calculation: its arithmetic, and the sentences that tell it.

    `events` happen to `{who}` the story is about; after one of `comparisons` it is about `{friend}`. `words` say it in
    the long style.
    """

    symbol: str
    apply: Callable[[int, int], int]
    operands: Callable[[int], list[int]]
    events: tuple[str, ...]
    comparisons: tuple[str, ...]
    words: str


_OPERATIONS = (
    _Operation(
        symbol="+",
        apply=lambda value, n: value + n,
        operands=lambda value: list(range(2, min(_LARGEST_TERM, LARGEST_RESULT - value) + 1)),
        events=(
            "{He} buys {n} more.",
            "{He} finds {n} more.",
            "{friend} gives {who} {n}.",
            "Then {n} more arrive.",
        ),
        comparisons=("{friend} has {n} more than {who}.",),
        words="{n} more",
    ),
    _Operation(
        symbol="-",
        apply=lambda value, n: value - n,
        operands=lambda value: list(range(2, min(_LARGEST_TERM, value - 1) + 1)),
        events=("{He} loses {n}.", "{He} sells {n}.", "{He} gives {friend} {n}.", "Then {n} get lost."),
        comparisons=("{friend} has {n} fewer than {who}.",),
        words="{n} fewer",
    ),
    _Operation(
        symbol="*",
        apply=lambda value, n: value * n,
        operands=lambda value: [n for n in _FACTORS if value * n <= LARGEST_RESULT],
        events=("The number grows {n} times.", "{He} makes it {n} times as many."),
        comparisons=("{friend} has {n} times as many as {who}.",),
        words="{n} times as many",
    ),
    _Operation(
        symbol="/",
        apply=lambda value, n: value // n,
        operands=lambda value: [n for n in _FACTORS if value % n == 0],
        events=("{He} makes {n} equal piles and keeps one.", "{He} keeps one of {n} equal parts."),
        comparisons=("{friend} gets one of {n} equal parts.",),
        words="One of {n} equal parts",
    ),
)


@dataclass(frozen=True)
class _Problem:
    prompt: str
    reasoning: dict[Style, str]
    answer: str


class _Story:
    """A problem while it is being told: whose story it is, the running value, what was said so far."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        # Every friend is new to the story: a name said before always means the person it is about.
        self._names = rng.sample(sorted(_PRONOUNS), k=len(_PRONOUNS))
        self._who = self._names.pop()
        self._things = rng.choice(_THINGS)
        self._value = 0
        self._sentences: list[str] = []
        self._calculations: list[str] = []
        self._explained: list[str] = []

    @property
    def steps(self) -> int:
        return len(self._calculations)

    def open_plain(self) -> None:
        """Start with a number of things, without a calculation."""
        self._value = self._rng.randint(3, 60)
        self._say(self._rng.choice(_OPENINGS), n=self._value)
        self._explain()

    def open_packed(self) -> None:
        """Start with some packs of things: the first step is a multiplication."""
        packs, size = self._rng.choice(_FACTORS), self._rng.randint(2, 11)
        self._say(self._rng.choice(_PACKED_OPENINGS), m=packs, n=size)
        self._calculate(packs, "*", size, packs * size)
        self._explain(f"{packs} times {size}")

    def advance(self) -> None:
        """Add one sentence and its calculation, from the operations possible at the running value."""
        options = [(op, operands) for op in _OPERATIONS if (operands := op.operands(self._value))]
        operation, operands = self._rng.choice(options)
        template = self._rng.choice(operation.events + operation.comparisons)
        n = self._rng.choice(operands)
        friend = self._names.pop()
        self._say(template, n=n, friend=friend)
        self._calculate(self._value, operation.symbol, n, operation.apply(self._value, n))
        if template in operation.comparisons:
            self._who = friend
        self._explain(operation.words.format(n=n))

    def ask(self) -> _Problem:
        """End with the question."""
        self._say(self._rng.choice(_QUESTIONS))
        reasoning: dict[Style, str] = {"short": " ".join(self._calculations), "long": " ".join(self._explained)}
        return _Problem(" ".join(self._sentences), reasoning, str(self._value))

    def _say(self, template: str, **fields: str | int) -> None:
        sentence = template.format(who=self._who, He=_PRONOUNS[self._who], things=self._things, **fields)
        self._sentences.append(sentence)

    def _calculate(self, left: int, symbol: str, right: int, result: int) -> None:
        self._calculations.append(f"{left}{symbol}{right}={result}.")
        self._value = result

    def _explain(self, words: str = "") -> None:
        """What the latest calculation was about, if there was one, and who has how many now."""
        calculation = [f"{words}: {self._calculations[-1]}"] if words else []
        self._explained += [*calculation, f"{self._who} has {self._value}."]


def generate(split: str, num_samples: int, seed: int = 0, style: Style = "short") -> Iterator[Sample]:
    """Yield `num_samples` different problems of a split, the same ones for the same seed, whatever their style.

    A shorter run yields the beginning of a longer one. The prompt alone decides a problem's split, so
    no two splits share a prompt, whatever the seeds. Raises ValueError for an unknown split or a count
    below one.
    """
    if split not in SPLIT_SHARES:
        raise ValueError(f"unknown split: expected one of {', '.join(SPLIT_SHARES)}, found {split!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, found {num_samples}")
    return _generate(split, num_samples, seed, style)


def _generate(split: str, num_samples: int, seed: int, style: Style) -> Iterator[Sample]:
    rng = Random(f"word-problems/{seed}")
    ids = (f"word-problems/{split}/{i:06d}" for i in count())
    seen: set[str] = set()
    while len(seen) < num_samples:
        problem = _tell(rng)
        if problem.prompt in seen or _split_of(problem.prompt) != split:
            continue
        seen.add(problem.prompt)
        yield Sample(next(ids), problem.prompt, problem.reasoning[style], problem.answer)


def _tell(rng: Random) -> _Problem:
    (steps,) = rng.choices(list(_STEP_WEIGHTS), weights=list(_STEP_WEIGHTS.values()))
    story = _Story(rng)
    rng.choice((story.open_plain, story.open_plain, story.open_packed))()
    while story.steps < steps:
        story.advance()
    return story.ask()


def _split_of(prompt: str) -> str:
    digest = hashlib.sha256(prompt.encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % sum(SPLIT_SHARES.values())
    for split, share in SPLIT_SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("a bucket lies below the sum of the shares")
