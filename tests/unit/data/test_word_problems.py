"""The generated word problems: reproducible, disjoint between splits, and right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise

import pytest
from kvpipe.data.sample import Sample, extract_answer
from kvpipe.data.word_problems import LARGEST_RESULT, generate

COUNT = 1500
SPLITS = ("train", "validation", "test")
CALCULATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)\.")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(generate("train", COUNT))


def calculations(sample: Sample) -> list[tuple[int, str, int, int]]:
    """The reasoning taken apart; fails where it is anything but calculations."""
    steps = sample.reasoning.split(" ")
    matches = [CALCULATION.fullmatch(step) for step in steps]
    assert all(matches), f"not a list of calculations: {sample.reasoning}"
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in matches if m]


def test_ids_number_the_samples_of_a_split(samples: list[Sample]) -> None:
    assert samples[17].id == "word-problems/train/000017"
    assert [s.id for s in samples] == [f"word-problems/train/{i:06d}" for i in range(COUNT)]


def test_every_calculation_is_right(samples: list[Sample]) -> None:
    exact = {
        "+": lambda a, b, c: a + b == c,
        "-": lambda a, b, c: a - b == c,
        "*": lambda a, b, c: a * b == c,
        "/": lambda a, b, c: c * b == a,
    }
    wrong = [s.reasoning for s in samples for a, op, b, c in calculations(s) if not exact[op](a, b, c)]
    assert wrong == []


def test_a_calculation_goes_on_from_the_last_result(samples: list[Sample]) -> None:
    for sample in samples:
        for (*_, result), (left, *_) in pairwise(calculations(sample)):
            assert left == result, sample.reasoning


def test_the_answer_is_the_last_result(samples: list[Sample]) -> None:
    assert all(int(s.answer) == calculations(s)[-1][-1] for s in samples)
    assert all(extract_answer(s.text) == s.answer for s in samples)


def test_the_reasoning_uses_the_numbers_of_the_prompt_in_order(samples: list[Sample]) -> None:
    for sample in samples:
        steps = calculations(sample)
        told = [int(number) for number in re.findall(r"\d+", sample.prompt)]
        assert told == [steps[0][0], *(right for _, _, right, _ in steps)], sample.text


def test_the_long_style_tells_the_same_story_in_more_words(samples: list[Sample]) -> None:
    for short, long in zip(samples, generate("train", COUNT, style="long"), strict=True):
        assert (long.id, long.prompt, long.answer) == (short.id, short.prompt, short.answer)
        assert " ".join(found[0] for found in CALCULATION.finditer(long.reasoning)) == short.reasoning
        assert re.findall(r"has (\d+)\.", long.reasoning)[-len(calculations(short)) :] == [
            str(result) for *_, result in calculations(short)
        ]
        (asked,) = re.findall(r"(?:does|has) (\w+) ?(?:have|now)?\?$", long.prompt)
        assert long.reasoning.endswith(f" {asked} has {long.answer}.")


def test_numbers_stay_in_range(samples: list[Sample]) -> None:
    numbers = [n for s in samples for a, _, b, c in calculations(s) for n in (a, b, c)]
    assert min(numbers) >= 0
    assert max(numbers) <= LARGEST_RESULT


def test_all_lengths_and_operations_occur(samples: list[Sample]) -> None:
    steps = [calculations(s) for s in samples]
    assert {len(s) for s in steps} == {1, 2, 3, 4}
    assert {operation for s in steps for _, operation, _, _ in s} == {"+", "-", "*", "/"}


def test_some_stories_are_handed_to_another_person(samples: list[Sample]) -> None:
    """The one asked about is not always the one the story starts with."""
    started_with_asked = [s.prompt.split()[0] in s.prompt.split("How many")[1] for s in samples]
    assert any(started_with_asked)
    assert not all(started_with_asked)


def test_a_comparison_asks_for_the_one_compared(samples: list[Sample]) -> None:
    comparison = re.compile(r".*\. (\w+) has \d+ (?:more|fewer|times as many) (?:than|as) \w+\. How many(.*)\?")
    matches = [match for s in samples if (match := comparison.fullmatch(s.prompt))]
    assert matches
    assert all(match[1] in match[2].split() for match in matches)


def test_prompts_are_unique_within_a_split(samples: list[Sample]) -> None:
    assert len({s.prompt for s in samples}) == COUNT


def test_splits_are_disjoint_whatever_the_seeds() -> None:
    prompts = {split: {s.prompt for seed in (0, 1) for s in generate(split, 400, seed)} for split in SPLITS}
    assert prompts["train"].isdisjoint(prompts["validation"])
    assert prompts["train"].isdisjoint(prompts["test"])
    assert prompts["validation"].isdisjoint(prompts["test"])


@pytest.mark.parametrize("split", SPLITS)
def test_a_short_run_is_the_beginning_of_a_long_one(split: str) -> None:
    assert list(generate(split, 20)) == list(generate(split, 200))[:20]


def test_seeds_give_different_problems(samples: list[Sample]) -> None:
    assert [s.prompt for s in generate("train", 50, seed=1)] != [s.prompt for s in samples[:50]]


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_another_process_generates_the_same(samples: list[Sample], hash_seed: str) -> None:
    program = (
        "from kvpipe.data.word_problems import generate\nfor sample in generate('train', 100): print(repr(sample.text))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [repr(s.text) for s in samples[:100]]


def test_unknown_split_is_refused_before_the_first_sample() -> None:
    with pytest.raises(ValueError, match="expected one of train, validation, test, found 'dev'"):
        generate("dev", 10)


@pytest.mark.parametrize("num_samples", [0, -3])
def test_an_empty_run_is_refused_before_the_first_sample(num_samples: int) -> None:
    with pytest.raises(ValueError, match=f"expected at least 1, found {num_samples}"):
        generate("train", num_samples)
