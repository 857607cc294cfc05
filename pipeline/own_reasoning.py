"""The teacher writes its own reasoning: it continues every prompt before any KV is captured."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from ..data.corpus import Corpus
from ..data.errors import DataError
from ..data.packed_tokens import PackedTokens
from ..data.sample import ANSWER_MARK, Sample, extract_answer
from ..data.tokenize import prompt_ids, tokenize
from ..kvcache.files import write_atomic
from ..kvcache.manifest import hash_json
from .extract_config import ExtractConfig
from .generation import GENERATION_BATCH, chunks, continue_batch
from .preparation import Prepared, require_kept
from .progress import progress_bar


def with_own_reasoning(prepared: Prepared, config: ExtractConfig, progress: Progress | None) -> Prepared:
    """The same problems as the teacher solves them, with or without those that it answers wrong.

    An interrupted call leaves a draft beside the store, and the next goes on from it. Raises DataError for samples
    without prompt and answer, and where the teacher leaves a split without any; ConfigError where it leaves no token to
    keep.
    """
    corpus = prepared.corpus
    _require_problems(corpus)
    with progress or progress_bar() as bar:
        texts, seconds = _texts(prepared, config, bar)
    said = iter(texts)
    splits, wrong = {}, 0
    for name, problems in corpus.splits.items():
        solved = [_solved(problem, next(said)) for problem in problems]
        right = [own for own, problem in zip(solved, problems, strict=True) if own.answer == problem.answer.strip()]
        wrong += len(solved) - len(right)
        splits[name] = right if config.wrong_answers == "drop" else solved
        if not splits[name]:
            raise DataError(
                config.dataset,
                expected=f"{name} problems that the teacher solves (its answer after {ANSWER_MARK!r})",
                found=f"none among {len(problems)}",
                remedy="Choose --wrong-answers keep, more --max-new-tokens, or another teacher",
            )
    own = Corpus(corpus.name, splits)
    tokens = PackedTokens.of(tokenize(own.samples(), prepared.tokenizer, prepared.manifest.max_tokens))
    require_kept(tokens, prepared.manifest)
    return replace(prepared, corpus=own, tokens=tokens, wrong_answers=wrong, reasoning_seconds=seconds)


def _require_problems(corpus: Corpus) -> None:
    for sample in corpus.samples():
        if not (sample.prompt and sample.answer):
            raise DataError(
                sample.id,
                expected="a prompt and an answer, which --reasoning teacher goes by",
                found=f"no {'answer' if sample.prompt else 'prompt'}",
                remedy="Leave it out, or choose --reasoning dataset",
            )


def _solved(problem: Sample, text: str) -> Sample:
    """The problem with the reasoning and the answer of a generated text."""
    reasoning, _, _ = text.partition(ANSWER_MARK.strip())
    return replace(problem, reasoning=reasoning.strip("\n"), answer=extract_answer(text) or "")


def _texts(prepared: Prepared, config: ExtractConfig, progress: Progress) -> tuple[list[str], float]:
    """What the teacher says to every prompt, in the order of the samples, and how many seconds it took for that."""
    prompts = [prompt_ids(sample).tolist() for sample in prepared.tokens]
    batches = _batches(prompts, config, prepared.manifest.max_tokens)
    draft = _Draft(draft_path(config.store), _what_decides(prepared, config), [len(batch) for _, batch in batches])
    task = progress.add_task("reasoning", total=len(prompts), status="")
    texts = [""] * len(prompts)
    for number, (room, batch) in enumerate(batches):
        if number == len(draft.batches):
            start = time.perf_counter()
            # Of the batch alone, so that what was interrupted goes on as it would have.
            torch.manual_seed(int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0]))
            tokens = [prompts[i] for i in batch]
            said = continue_batch(prepared.teacher, prepared.tokenizer, tokens, room, config.temperature)
            draft.add(said, time.perf_counter() - start)
        for i, text in zip(batch, draft.batches[number]["texts"], strict=True):
            texts[i] = text
        progress.update(task, advance=len(batch))
    progress.update(task, completed=len(prompts))
    return texts, sum(batch["seconds"] for batch in draft.batches)


def _batches(prompts: list[list[int]], config: ExtractConfig, max_tokens: int) -> list[tuple[int, list[int]]]:
    """Prompts of about one length, which have room for as many new tokens; those that have none are left out."""

    def room(i: int) -> int:
        return min(config.max_new_tokens, max_tokens - len(prompts[i]))

    order = sorted((i for i in range(len(prompts)) if room(i) > 0), key=lambda i: len(prompts[i]))
    size = config.batch_size or GENERATION_BATCH
    return [(space, batch) for space, same in groupby(order, room) for batch in chunks(list(same), size)]


def _what_decides(prepared: Prepared, config: ExtractConfig) -> str:
    """Hash of all that the texts depend on, and of nothing else: a draft serves whatever is kept of it."""
    m = prepared.manifest
    size = config.batch_size or GENERATION_BATCH
    generation = (m.seed, config.temperature, config.max_new_tokens, m.max_tokens, size)
    return hash_json([asdict(m.teacher), m.tokenizer_hash, asdict(m.dataset), m.dtype, *generation])


def draft_path(store: Path) -> Path:
    """Where the texts of an extraction that is not yet a store are kept."""
    return store.with_name(f".{store.name}.reasoning.jsonl")


class _Draft:
    """The batches that are done, `sizes` texts and their seconds on a line each, after a line that says what decides
    them."""

    def __init__(self, path: Path, identity: str, sizes: list[int]) -> None:
        self._path = path
        header, *lines = _whole_lines(path) or [""]
        sound = takewhile(_is_batch, zip(lines, sizes, strict=False))
        self.batches: list[dict[str, Any]] = [line for line, _ in sound] if header == identity else []
        write_atomic(path, "".join(f"{json.dumps(line)}\n" for line in [identity, *self.batches]).encode())

    def add(self, texts: list[str], seconds: float) -> None:
        """Keep a batch, on the disk before the next begins."""
        self.batches.append({"texts": texts, "seconds": seconds})
        with self._path.open("a") as file:
            file.write(f"{json.dumps(self.batches[-1])}\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[Any]:
    """What of a draft can be read: a killed process may leave half a line, a damaged draft is none."""
    try:
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    except (FileNotFoundError, ValueError):
        return []


def _is_batch(found: tuple[Any, int]) -> bool:
    line, size = found
    if not isinstance(line, dict) or not isinstance(line.get("seconds"), float):
        return False
    texts = line.get("texts")
    return isinstance(texts, list) and len(texts) == size and all(isinstance(text, str) for text in texts)
