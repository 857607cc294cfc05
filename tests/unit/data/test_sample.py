"""A sample's text is its segments, and the answer can be found in it again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.data.sample import Sample, Segment, extract_answer

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="#\n"), max_size=20)


def test_a_text_is_prompt_reasoning_and_answer_a_line_each() -> None:
    sample = Sample("0", "How many?", "2+3=5.", "5")
    assert sample.text == "How many?\n2+3=5.\n#### 5"
    assert [segment for segment, _ in sample.parts()] == [Segment.PROMPT, Segment.REASONING, Segment.ANSWER]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("", "plain text", ""), "plain text"),
        (("p", "", "a"), "p\n#### a"),
        (("p", "r", ""), "p\nr"),
        (("", "", "a"), "#### a"),
        (("p", "", ""), "p\n"),
        (("", "", ""), ""),
    ],
)
def test_empty_segments_are_left_out(parts: tuple[str, str, str], text: str) -> None:
    sample = Sample("0", *parts)
    assert sample.text == text
    assert len(sample.parts()) == sum(map(bool, parts))


@given(prompt=WORDS, reasoning=WORDS, answer=WORDS)
def test_the_parts_make_up_the_text_in_reading_order(prompt: str, reasoning: str, answer: str) -> None:
    sample = Sample("0", prompt, reasoning, answer)
    assert "".join(part for _, part in sample.parts()) == sample.text
    segments = [segment for segment, _ in sample.parts()]
    assert segments == sorted(segments)


@given(prompt=WORDS, reasoning=WORDS, answer=WORDS.filter(bool))
def test_the_answer_is_found_in_the_text(prompt: str, reasoning: str, answer: str) -> None:
    assert extract_answer(Sample("0", prompt, reasoning, answer).text) == answer.strip()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2+3=5.\n#### 5", "5"),
        ("#### 5\nand more", "5"),
        ("####   5  ", "5"),
        ("####5", "5"),
        ("#### 5\n#### 6", "5"),
        ("####", ""),
        ("no mark: 5", None),
        ("### 5", None),
        ("", None),
    ],
)
def test_the_first_mark_counts(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer
