"""Reading data sets: every line a sample or a refusal that names it, and splits that share no prompt."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.data.corpus import BUILTIN_DATASET, Corpus, load_corpus, parse_row, read_jsonl
from kvpipe.data.errors import DataError
from kvpipe.data.sample import Sample

SPLITS = ("train", "validation", "test")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)
FIELD_NAMES = st.sampled_from(["id", "prompt", "reasoning", "answer", "question", "text", "other"])
TEXTS = st.text() | st.text(st.characters(categories=["Cs", "Nd"])) | st.text("#\n ab1") | st.just("<<1+1=2>>2\n#### 2")
ROWS = JSON | st.dictionaries(FIELD_NAMES, JSON | TEXTS, max_size=5) | st.dictionaries(FIELD_NAMES, TEXTS, max_size=5)

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: str | bytes, name: str = "numbers.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def numbered(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"n{i}", "prompt": f"{i}+1?", "reasoning": f"{i}+1={i + 1}.", "answer": f"{i + 1}"} for i in range(count)
    ]


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "reasoning": "r", "answer": "a"}, ("p", "r", "a")),
        ({"prompt": "p"}, ("p", "", "")),
        ({"prompt": "p", "reasoning": None, "answer": "a"}, ("p", "", "a")),
        ({"question": "q", "answer": "One.\nTwo.\n#### 72"}, ("q", "One.\nTwo.", "72")),
        ({"question": "q", "answer": "#### 1 is not\n#### 2"}, ("q", "#### 1 is not", "2")),
        ({"question": "q", "answer": "72"}, ("q", "", "72")),
        ({"text": "Once upon a time."}, ("", "Once upon a time.", "")),
        ({"prompt": "p", "question": "q", "text": "t", "answer": "a"}, ("p", "", "a")),
        ({"prompt": "π ≈ 3 \U0001f967", "answer": "\0"}, ("π ≈ 3 \U0001f967", "", "\0")),
    ],
)
def test_the_three_styles_of_fields(row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert parse_row(row, "here", "x/1") == Sample("x/1", *expected)


def test_a_row_may_name_its_sample() -> None:
    assert parse_row({"id": 7, "text": "t"}, "here", "x/1").id == "7"
    assert parse_row({"id": None, "text": "t"}, "here", "x/1").id == "x/1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "expected a JSON object, found list"),
        ("text", "expected a JSON object, found str"),
        (None, "expected a JSON object, found NoneType"),
        ({}, "found none"),
        ({"prompts": "p", "b": 1}, "expected the fields prompt .* found b, prompts"),
        ({"question": "q"}, "expected the fields"),
        ({"prompt": None, "answer": "a"}, "expected the fields"),
        ({"prompt": 3}, "expected prompt to be text .* found 3"),
        ({"prompt": "p", "reasoning": ["r"]}, "expected reasoning to be text"),
        ({"prompt": "p", "answer": 72}, "expected answer to be text"),
        ({"prompt": "p", "answer": "a\nb"}, "an answer on one line"),
        ({"question": "q", "answer": "no mark\nand two lines"}, "an answer on one line"),
        ({"text": ""}, "found an empty sample"),
        ({"prompt": "", "answer": "a"}, "found an empty sample"),
        ({"prompt": "half \ud83d"}, "expected prompt to be Unicode text"),
        ({"text": "\udc00"}, "expected reasoning to be Unicode text"),
    ],
)
def test_other_rows_are_refused_where_they_stand(row: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_row(row, "numbers.jsonl, line 3", "x/1")
    assert str(caught.value).startswith("numbers.jsonl, line 3: expected ")
    assert str(caught.value).endswith(". Mend it, or leave it out")
    assert "\n" not in str(caught.value)


@given(ROWS)
def test_any_json_value_is_a_sample_or_refused(row: Any) -> None:
    row = json.loads(json.dumps(row))
    try:
        sample = parse_row(row, "here", "x/1")
    except DataError:
        return
    assert sample.text.encode().decode() == sample.text
    assert sample.prompt or sample.reasoning
    assert "\n" not in sample.answer


# ---------------------------------------------------------------------- files


def test_lines_are_read_whatever_their_ends_and_gaps(write: Write) -> None:
    expected = [Sample(f"numbers/00000{n}", "", text, "") for n, text in ((1, "a"), (3, "b\u2028c"), (5, "d"))]
    lines = ['{"text": "a"}', "", '{"text": "b\u2028c"}', "  \t", '{"text": "d"}']
    for end in ("\n", "\r\n"):
        for mark in ("", "\ufeff"):
            for last in ("", end):
                assert read_jsonl(write(mark + end.join(lines) + last)) == expected


def test_an_empty_file_has_no_samples(write: Write) -> None:
    assert read_jsonl(write("")) == []
    with pytest.raises(DataError, match=r"expected at least 3 samples .* found 0"):
        load_corpus(str(write("\n\n")), None, 1, 0)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "{'text': 'a'}",
        "nonsense",
        '{"text": "a"} {"text": "b"}',
        "\0",
        '{"text": "a\0b"}',
        "[" * 100_000,
        '{"id": ' + "9" * 5000 + ', "text": "a"}',
        "[1, 2]",
        "null",
        '{"text": "\\ud800"}',
    ],
    ids=lambda line: line[:12],
)
def test_a_line_that_is_no_sample_is_named(write: Write, line: str) -> None:
    path = write(f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n')
    with pytest.raises(DataError, match=r"numbers\.jsonl, line 3: expected") as caught:
        read_jsonl(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < len(str(path)) + 300


def test_a_file_in_another_encoding_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match=r"numbers\.jsonl: expected UTF-8 text, found byte 0xe9"):
        read_jsonl(write('{"text": "caf\u00e9"}'.encode("latin-1")))
    with pytest.raises(DataError, match="expected UTF-8 text"):
        read_jsonl(write('{"text": "a"}'.encode("utf-16")))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: expected a .jsonl file, found nothing to read\. Name"):
        load_corpus(str(tmp_path / "none.jsonl"), None, 1, 0)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="found nothing to read"):
        load_corpus(str(tmp_path / "folder.jsonl"), None, 1, 0)


# ---------------------------------------------------------------------- splits


def prompts_of(corpus: Corpus) -> dict[str, set[str]]:
    return {split: {sample.prompt or sample.text for sample in corpus.splits[split]} for split in SPLITS}


def check_splits(corpus: Corpus, total: int) -> None:
    prompts = prompts_of(corpus)
    assert list(corpus.splits) == list(SPLITS)
    assert all(prompts.values())
    assert sum(map(len, corpus.splits.values())) == total
    assert len(set.union(*prompts.values())) == sum(map(len, prompts.values()))


@pytest.mark.parametrize(
    ("count", "held_out", "sizes"),
    [
        (3, 256, (1, 1, 1)),
        (40, 256, (32, 4, 4)),
        (40, 3, (34, 3, 3)),
        (1000, 256, (800, 100, 100)),
        (19, 9, (17, 1, 1)),
    ],
)
def test_a_tenth_at_most_is_held_out_for_each_split(
    write: Write, count: int, held_out: int, sizes: tuple[int, int, int]
) -> None:
    corpus = load_corpus(str(write(as_lines(numbered(count)))), None, held_out, 0)
    check_splits(corpus, count)
    assert tuple(len(corpus.splits[split]) for split in SPLITS) == sizes
    assert corpus.name == "numbers"


def test_the_choice_does_not_depend_on_the_order_of_the_file_or_the_seed(write: Write) -> None:
    rows = numbered(60)
    first = load_corpus(str(write(as_lines(rows))), None, 5, 0)
    random.Random(0).shuffle(rows)
    second = load_corpus(str(write(as_lines(rows))), None, 5, 1)
    assert prompts_of(first) == prompts_of(second)
    assert [sample.id for sample in second.splits["train"]] == [
        row["id"] for row in rows if row["prompt"] in prompts_of(first)["train"]
    ]


@given(copies=st.lists(st.integers(1, 4), min_size=6, max_size=30), held_out=st.integers(1, 5), seed=st.integers(0, 99))
def test_samples_with_one_prompt_stay_together(
    tmp_path_factory: pytest.TempPathFactory, copies: list[int], held_out: int, seed: int
) -> None:
    rows = [
        {"prompt": f"{i}?", "reasoning": f"way {copy}", "answer": str(i)}
        for i, number in enumerate(copies)
        for copy in range(number)
    ]
    random.Random(seed).shuffle(rows)
    path = tmp_path_factory.mktemp("copies") / "copies.jsonl"
    path.write_text(as_lines(rows))
    corpus = load_corpus(str(path), None, held_out, 0)
    check_splits(corpus, len(rows))
    wanted = min(held_out, max(1, len(rows) // 10))
    assert all(wanted <= len(corpus.splits[split]) < wanted + 4 for split in ("validation", "test"))


def test_plain_texts_are_split_by_their_text(write: Write) -> None:
    corpus = load_corpus(str(write(as_lines([{"text": f"story {i % 20}"} for i in range(40)]))), None, 4, 0)
    check_splits(corpus, 40)


def test_training_samples_can_be_limited(write: Write) -> None:
    path = str(write(as_lines(numbered(50))))
    whole, limited = load_corpus(path, None, 5, 0), load_corpus(path, 7, 5, 0)
    assert limited.splits["train"] == whole.splits["train"][:7]
    assert limited.splits["test"] == whole.splits["test"]


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_samples_are_refused(write: Write, count: int) -> None:
    with pytest.raises(DataError, match=rf"at least 3 samples \(train, validation, test\), found {count}"):
        load_corpus(str(write(as_lines(numbered(count)))), None, 1, 0)


def test_one_prompt_repeated_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match="expected different prompts for every split, found none left for"):
        load_corpus(str(write(as_lines(numbered(1) * 30))), None, 1, 0)


@pytest.mark.parametrize(("train", "held_out"), [(0, 1), (-1, 1), (1, 0), (None, 0), (None, -2)])
def test_a_split_needs_a_sample(train: int | None, held_out: int) -> None:
    with pytest.raises(DataError, match=r"samples: expected at least 1, found"):
        load_corpus(BUILTIN_DATASET, train, held_out, 0)


def test_the_built_in_problems_need_no_file() -> None:
    corpus = load_corpus(BUILTIN_DATASET, 30, 5, 0)
    check_splits(corpus, 40)
    assert load_corpus(BUILTIN_DATASET, 30, 5, 0) == corpus
    assert load_corpus(BUILTIN_DATASET, 30, 5, 1) != corpus


def test_a_hub_data_set_without_the_package_for_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"'nobody/numbers': expected word-problems, .*`pip install 'kvpipe\[hub\]'"
    ) as caught:
        load_corpus("nobody/numbers", None, 1, 0)
    assert "\n" not in str(caught.value)


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text('{"text": "a"}\n{"prompt": "p", "answer": "1", "prompt": "q"}\n')
    with pytest.raises(DataError, match=r"twice\.jsonl, line 2: .*'prompt' comes twice"):
        read_jsonl(path)
