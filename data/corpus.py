"""Where samples come from: the built-in word problems, a `.jsonl` file, or a data set of the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from . import word_problems
from .errors import DataError
from .sample import ANSWER_MARK, Sample

BUILTIN_DATASET = "word-problems"
BUILTIN_DATASETS: dict[str, word_problems.Style] = {BUILTIN_DATASET: "short", "word-problems-long": "long"}
"""The same problems, in two styles of reasoning."""

BUILTIN_TRAIN_SAMPLES = 4000
HELD_OUT = ("validation", "test")
FIELDS = "prompt (with reasoning and answer), question and answer, or text"


@dataclass(frozen=True)
class Corpus:
    """The samples of every split. No prompt is in two splits."""

    name: str
    splits: Mapping[str, list[Sample]]

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.splits.values()))

    def samples(self) -> Iterator[Sample]:
        """Of all splits, one split after the other."""
        return chain.from_iterable(self.splits.values())


def load_corpus(dataset: str, num_train: int | None, num_held_out: int, seed: int) -> Corpus:
    """Read a data set into train, validation and test.

    `num_train` limits the training split (None: 4000 built-in problems, or all of a file); each of the other
    two has `num_held_out` samples at most, or more where samples share a prompt. Raises DataError for what is
    missing, empty or malformed.
    """
    if (num_train is not None and num_train < 1) or num_held_out < 1:
        option, found = ("--eval-samples", num_held_out) if num_held_out < 1 else ("--samples", num_train)
        raise DataError(option, expected="at least 1", found=found, remedy=f"Mend {option}")
    if dataset in BUILTIN_DATASETS:
        sizes = {"train": num_train or BUILTIN_TRAIN_SAMPLES, **dict.fromkeys(HELD_OUT, num_held_out)}
        style = BUILTIN_DATASETS[dataset]
        return Corpus(dataset, {s: list(word_problems.generate(s, n, seed, style)) for s, n in sizes.items()})
    samples = read_jsonl(Path(dataset)) if dataset.endswith(".jsonl") else _read_hub(dataset)
    return Corpus(Path(dataset).stem, _split(samples, num_train, num_held_out, dataset))


def read_jsonl(path: Path) -> list[Sample]:
    """The samples of a JSON Lines file. Raises DataError naming the line that is not one."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            return [
                _parse_line(line, f"{path}, line {number}", f"{path.stem}/{number:06d}")
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x}"
        raise DataError(path, expected="UTF-8 text", found=found, remedy="Convert the file to UTF-8") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(
            path, expected="a .jsonl file", found="nothing to read", remedy="Name a file that is there with --dataset"
        ) from error


def _parse_line(line: str, where: str, default_id: str) -> Sample:
    try:
        row = json.loads(line, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _refused(where, "a JSON object", f"{line.strip()[:40]!r} ({error})") from error
    return parse_row(row, where, default_id)


def _refused(where: str, expected: str, found: str) -> DataError:
    return DataError(where, expected=expected, found=found, remedy="Mend it, or leave it out")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON would let the last of two values win without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice")
    return row


def parse_row(row: Any, where: str, default_id: str) -> Sample:
    """One sample from a mapping with prompt/reasoning/answer, question/answer (`#### ` before the final
    answer, as in GSM8K), or text. Raises DataError saying `where` for anything else."""
    if not isinstance(row, Mapping):
        raise _refused(where, "a JSON object", type(row).__name__)
    row = {name: value for name, value in row.items() if value is not None}
    if "prompt" in row:
        prompt, reasoning, answer = row["prompt"], row.get("reasoning", ""), row.get("answer", "")
    elif "question" in row and "answer" in row:
        if not isinstance(row["answer"], str):
            raise _refused(where, "answer to be text", f"{row['answer']!r:.40}")
        reasoning, _, answer = row["answer"].rpartition(ANSWER_MARK)
        prompt, reasoning = row["question"], reasoning.rstrip("\n")
    elif "text" in row:
        prompt, reasoning, answer = "", row["text"], ""
    else:
        raise _refused(where, f"the fields {FIELDS}", ", ".join(sorted(row)) or "none")
    texts = {"prompt": prompt, "reasoning": reasoning, "answer": answer}
    for name, text in texts.items():
        if not isinstance(text, str) or (name == "answer" and "\n" in text):
            raise _refused(where, f"{name} to be text (an answer on one line)", f"{text!r:.40}")
        if not _is_unicode(text):
            raise _refused(where, f"{name} to be Unicode text", "half of a surrogate pair")
    if not (prompt or reasoning):
        raise _refused(where, "some text", "an empty sample")
    return Sample(str(row.get("id", default_id)), **texts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_hub(name: str) -> list[Sample]:
    if Path(name).exists():
        raise DataError(
            name,
            expected="a file that ends in .jsonl, with a JSON object a line",
            found="another",
            remedy="Convert it, or name another with --dataset",
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            repr(name),
            expected=f"{', '.join(BUILTIN_DATASETS)}, a .jsonl path, or a Hub data set, which needs more packages",
            found="none of these",
            remedy="Mend --dataset, or `pip install 'kvpipe[hub]'`",
        ) from error
    try:
        rows: Iterable[Any] = load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        raise DataError(
            repr(name),
            expected=f"{', '.join(BUILTIN_DATASETS)}, a .jsonl path or a reachable Hub data set",
            found=error,
            remedy="Mend --dataset, or reach the Hub",
        ) from error
    return [parse_row(row, f"{name}, row {i}", f"{name}/{i:06d}") for i, row in enumerate(rows)]


def _split(samples: list[Sample], num_train: int | None, num_held_out: int, dataset: str) -> dict[str, list[Sample]]:
    """Hold out a tenth at most for each of validation and test, by a hash of the prompt: the choice does not
    depend on the order of the file, and samples with one prompt stay together."""
    if len(samples) < 3:
        raise DataError(
            dataset,
            expected="at least 3 samples (train, validation, test)",
            found=len(samples),
            remedy="Add some, or name another with --dataset",
        )
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt or sample.text, []).append(sample)
    prompts = sorted(by_prompt, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    wanted = min(num_held_out, max(1, len(samples) // 10))
    split_of: dict[str, str] = {}
    for split in HELD_OUT:
        count = 0
        while count < wanted and prompts:
            prompt = prompts.pop()
            split_of[prompt] = split
            count += len(by_prompt[prompt])
    splits: dict[str, list[Sample]] = {"train": [], **{split: [] for split in HELD_OUT}}
    for sample in samples:
        splits[split_of.get(sample.prompt or sample.text, "train")].append(sample)
    splits["train"] = splits["train"][:num_train]
    for split, members in splits.items():
        if not members:
            raise DataError(
                dataset,
                expected="different prompts for every split",
                found=f"none left for {split}",
                remedy="Add samples with other prompts, or lower --eval-samples",
            )
    return splits
