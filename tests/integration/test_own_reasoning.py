"""`extract --reasoning teacher`: the teacher writes the reasoning whose KV it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from kvpipe.data.corpus import load_corpus
from kvpipe.data.errors import DataError
from kvpipe.data.sample import Sample
from kvpipe.kvcache.errors import ConfigError
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline import own_reasoning
from kvpipe.pipeline.experiment import run_experiment
from kvpipe.pipeline.experiment_config import load_experiment
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.own_reasoning import draft_path
from rich.progress import Progress

SAMPLES, HELD_OUT = 20, 4


def config(folder: Path, **changes: Any) -> ExtractConfig:
    plain = ExtractConfig("qwen", folder / "x.zarr", samples=SAMPLES, eval_samples=HELD_OUT, reasoning="teacher")
    return replace(plain, **changes)


def problems() -> list[Sample]:
    splits = load_corpus("word-problems", SAMPLES, HELD_OUT, 0).splits
    return [sample for members in splits.values() for sample in members]


def test_a_good_teacher_writes_what_it_learned_from(tmp_path: Path) -> None:
    """The built-in teacher solves nearly all of its problems, in the words of the data set."""
    store = extract(config(tmp_path), Progress(disable=True)).store
    written = {record["id"]: Sample(**record) for record in store.records}
    asked = {problem.id: problem for problem in problems()}
    assert written.keys() <= asked.keys()
    assert len(written) == store.num_samples == len(asked) - store.wrong_answers
    assert store.wrong_answers <= 2
    assert all(sample.answer == asked[name].answer for name, sample in written.items())
    # Another CPU's rounding may choose another word now and then.
    assert sum(sample == asked[name] for name, sample in written.items()) >= len(written) - 2
    assert store.extraction["seconds"] > 0
    assert store.manifest.reasoning == "teacher (greedy, 256 new tokens at most, wrong answers: drop)"
    assert store.manifest.dataset.num_samples == len(asked)


def test_a_store_of_the_data_sets_reasoning_is_another_one(kvpipe: Any, tmp_path: Path) -> None:
    options = ("--model", "qwen", "--samples", SAMPLES, "--eval-samples", HELD_OUT, "--store", "x.zarr")
    first = kvpipe("extract", *options, "--reasoning", "teacher", cwd=tmp_path)
    assert "tokens in" in first.stdout
    again = kvpipe("extract", *options, "--reasoning", "teacher", cwd=tmp_path)
    assert "already complete" in again.stdout
    other = kvpipe("extract", *options, cwd=tmp_path, code=2)
    assert (
        "x.zarr holds another extraction (reasoning differs): expected dataset, found teacher (greedy" in other.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.zarr"]


def test_a_bad_teacher_solves_nothing(kvpipe: Any, teacher: Path, tmp_path: Path) -> None:
    options = ("--model", teacher, "--samples", SAMPLES, "--eval-samples", HELD_OUT, "--max-new-tokens", 8)
    refused = kvpipe("extract", *options, "--reasoning", "teacher", "--store", "x.zarr", cwd=tmp_path, code=2)
    assert "expected train problems that the teacher solves (its answer after '#### ')" in refused.stderr
    assert not (tmp_path / "x.zarr").exists()
    kept = kvpipe(
        *("extract", *options, "--reasoning", "teacher", "--wrong-answers", "keep", "--store", "y.zarr"), cwd=tmp_path
    )
    assert "28 of 28 problems have another answer than the teacher gave (--wrong-answers)." in kept.stdout
    store = KVStore.open(tmp_path / "y.zarr")
    assert [record["prompt"] for record in store.records] == [problem.prompt for problem in problems()]
    assert len({record["reasoning"] for record in store.records}) > 10
    assert store.wrong_answers == store.num_samples == 28


def texts(store: KVStore) -> list[str]:
    return [record["reasoning"] for record in store.records]


@pytest.fixture
def sampled(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExtractConfig]:
    """A random teacher at temperature 1, in several batches."""
    monkeypatch.setattr(own_reasoning, "GENERATION_BATCH", 6)
    options = {"model": str(teacher), "wrong_answers": "keep", "temperature": 1.0, "max_new_tokens": 12}

    def make(name: str, **changes: Any) -> ExtractConfig:
        return config(tmp_path, store=tmp_path / name, **options, **changes)

    return make


def test_sampled_reasoning_depends_on_the_seed_alone(sampled: Callable[..., ExtractConfig], tmp_path: Path) -> None:
    quiet = Progress(disable=True)
    first, again = (extract(sampled(f"{i}.zarr"), quiet).store for i in range(2))
    assert texts(first) == texts(again)
    assert len(set(texts(first))) > 20
    # The same problems: only what is sampled has another seed.
    dataset = tmp_path / "problems.jsonl"
    dataset.write_text("".join(f"{json.dumps(asdict(problem))}\n" for problem in problems()))
    one, other = (extract(sampled(f"seed{s}.zarr", dataset=str(dataset), seed=s), quiet).store for s in (0, 1))
    assert [record["prompt"] for record in one.records] == [record["prompt"] for record in other.records]
    assert texts(one) != texts(other)


class Interrupted(Progress):
    """Ctrl-C after so many batches of reasoning."""

    def __init__(self, batches: int) -> None:
        super().__init__(disable=True)
        self.left = batches

    def update(self, *arguments: Any, **options: Any) -> None:
        super().update(*arguments, **options)
        self.left -= "advance" in options
        if not self.left:
            raise KeyboardInterrupt


def interrupt(extraction: ExtractConfig, batches: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        extract(extraction, Interrupted(batches))


@pytest.mark.parametrize("torn", [False, True], ids=["whole lines", "half a line"])
def test_an_interrupted_draft_is_gone_on_with(sampled: Callable[..., ExtractConfig], torn: bool) -> None:
    expected = texts(extract(sampled("whole.zarr"), Progress(disable=True)).store)
    cut = sampled("cut.zarr")
    interrupt(cut, 3)
    draft = draft_path(cut.store)
    before = draft.read_text()
    assert before.count("\n") == 4
    if torn:
        draft.write_text(before[:-5])
    interrupt(cut, 3)
    again = draft.read_text()
    whole = before.count("\n") - torn
    assert again.splitlines()[:whole] == before.splitlines()[:whole], "batches that are there are not written again"
    assert again.count("\n") == 4
    assert texts(extract(cut, Progress(disable=True)).store) == expected
    assert not draft.exists()


def test_a_draft_of_another_extraction_is_not_used(sampled: Callable[..., ExtractConfig]) -> None:
    cut = sampled("cut.zarr")
    interrupt(cut, 3)
    other = replace(cut, temperature=0.5)
    expected = texts(extract(replace(other, store=cut.store.with_name("whole.zarr")), Progress(disable=True)).store)
    assert texts(extract(other, Progress(disable=True)).store) == expected


def test_text_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "story {i}"}}\n' for i in range(30)))
    with pytest.raises(DataError, match=r"text/\d+: expected a prompt and an answer, .* found no prompt"):
        extract(config(tmp_path, dataset=str(tmp_path / "text.jsonl")), Progress(disable=True))


def test_a_draft_serves_whatever_is_kept_of_its_texts(sampled: Callable[..., ExtractConfig]) -> None:
    expected = texts(extract(sampled("whole.zarr"), Progress(disable=True)).store)
    cut = sampled("cut.zarr")
    interrupt(cut, 3)
    before = draft_path(cut.store).read_text()
    other = replace(cut, codec="int8", segments="prompt,reasoning")
    interrupt(other, 3)
    assert draft_path(cut.store).read_text() == before
    assert texts(extract(other, Progress(disable=True)).store) == expected


DAMAGE = ['["a"]', '{"texts": ["a"], "seconds": 1.0}', '{"texts": [1, 2, 3, 4, 5, 6], "seconds": 1.0}', "{"]


@pytest.mark.parametrize("line", DAMAGE)
def test_a_damaged_draft_is_none(sampled: Callable[..., ExtractConfig], line: str) -> None:
    expected = texts(extract(sampled("whole.zarr"), Progress(disable=True)).store)
    cut = sampled("cut.zarr")
    interrupt(cut, 2)
    draft = draft_path(cut.store)
    header, _, *rest = draft.read_text().splitlines()
    draft.write_text("".join(f"{part}\n" for part in (header, line, *rest)))
    assert texts(extract(cut, Progress(disable=True)).store) == expected


def test_long_prompts_silence_no_others(teacher: Path, tmp_path: Path) -> None:
    """A prompt that fills what the teacher may read leaves no room for reasoning: the others have theirs."""
    limit, rows = 60, [asdict(problem) for problem in problems()]
    lengths = {row["id"]: len(row["prompt"]) for row in rows}
    rows[0] = {**rows[0], "prompt": "Tom has 3 pens. " * 40}
    dataset = tmp_path / "problems.jsonl"
    dataset.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = {"model": str(teacher), "dataset": str(dataset), "max_tokens": limit, "wrong_answers": "keep"}
    store = extract(config(tmp_path, **options, temperature=1.0), Progress(disable=True)).store
    written = {record["id"]: record["reasoning"] + record["answer"] for record in store.records}
    assert written[rows[0]["id"]] == ""
    short = [name for name in written if lengths[name] < 2 * limit and name != rows[0]["id"]]
    assert len(short) > 10
    assert sum(bool(written[name]) for name in short) > 0.8 * len(short)


def test_problems_without_reasoning_get_some(tmp_path: Path) -> None:
    """What is kept is judged by what the teacher wrote."""
    rows = [{**asdict(problem), "reasoning": ""} for problem in problems()]
    (tmp_path / "bare.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = {"dataset": str(tmp_path / "bare.jsonl"), "segments": "reasoning", "batch_size": 5}
    store = extract(config(tmp_path, **options), Progress(disable=True)).store
    assert len(store.excluded) == 0
    assert all(record["reasoning"] for record in store.records)


def test_students_of_other_text_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        """
        name = "x"
        primary_metric = "ce"
        greater_is_better = false
        seeds = [1]
        [extract]
        model = "qwen"
        samples = 20
        eval_samples = 4
        [stores.long]
        dataset = "word-problems-long"
        [budget]
        max_steps = 2
        [arms.short]
        mode = "none"
        [arms.long]
        mode = "none"
        store = "long"
        [[comparisons]]
        arm = "long"
        control = "short"
        """
    )
    places = [f"extract.store={tmp_path}/a.zarr", f"stores.long.store={tmp_path}/b.zarr"]
    with pytest.raises(ConfigError, match=r"long and short cannot be compared: .* hold other text"):
        run_experiment(load_experiment(tmp_path / "x.toml", places), tmp_path / "runs")
    assert not list(tmp_path.glob("runs/*/config.json"))
