"""One training sample and the three segments of its text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from .errors import DataError


class Segment(IntEnum):
    """Which part of a sample a token belongs to. Padding carries `Segment.PADDING`."""

    PADDING = -1
    PROMPT = 0
    REASONING = 1
    ANSWER = 2


def select_segments(text: str) -> tuple[str, ...]:
    """The segments that `--segments` names, in reading order: `all`, or some of prompt, reasoning and answer.

    Raises DataError for any other.
    """
    names = [segment.name.lower() for segment in Segment if segment != Segment.PADDING]
    wanted = names if text == "all" else [name.strip() for name in text.split(",")]
    if unknown := [name for name in wanted if name not in names]:
        expected = f"all, or some of {', '.join(names)}"
        raise DataError("--segments", expected=expected, found=unknown[0] or "nothing", remedy="Mend --segments")
    return tuple(name for name in names if name in wanted)


ANSWER_MARK = "#### "


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, the reasoning that solves it and its final answer.

    Plain text without a question is a sample with `reasoning` alone.
    """

    id: str
    prompt: str
    reasoning: str
    answer: str

    def parts(self) -> list[tuple[Segment, str]]:
        """The text cut into segments, in reading order; empty segments are left out."""
        parts = []
        if self.prompt:
            parts.append((Segment.PROMPT, f"{self.prompt}\n"))
        if self.reasoning:
            parts.append((Segment.REASONING, f"{self.reasoning}\n" if self.answer else self.reasoning))
        if self.answer:
            parts.append((Segment.ANSWER, f"{ANSWER_MARK}{self.answer}"))
        return parts

    @property
    def text(self) -> str:
        """What the teacher and the student read: prompt, reasoning, then `#### answer`, a line each."""
        return "".join(part for _, part in self.parts())


def extract_answer(text: str) -> str | None:
    """The answer after the first `#### ` mark of a generated text, or None where there is no mark."""
    _, mark, answer = text.partition(ANSWER_MARK.strip())
    return answer.strip().split("\n")[0].strip() if mark else None
