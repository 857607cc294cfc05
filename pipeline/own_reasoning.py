"""The teacher writes its own reasoning: it continues every prompt before any KV is captured."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from ..data.corpus import Corpus
from ..data.errors import DataError
from ..data.sample import ANSWER_MARK, Sample, extract_answer
from ..data.tokenize import prompt_ids, tokenize
from ..kvcache.files import write_atomic
from .extract_config import ExtractConfig
from .generation import GENERATION_BATCH, chunks, generate_texts
from .preparation import Prepared


def with_own_reasoning(prepared: Prepared, config: ExtractConfig, progress: Progress) -> Prepared:
    """The same problems as the teacher solves them, with or without those that it answers wrong.

    An interrupted call leaves a draft beside the store, and the next goes on from it. Raises DataError for samples
    without prompt and answer, and where the teacher leaves a split without any.
    """
    corpus = prepared.corpus
    for sample in chain.from_iterable(corpus.splits.values()):
        if not (sample.prompt and sample.answer):
            raise DataError(
                f"{sample.id}: expected a prompt and an answer, which --reasoning teacher goes by, found "
                f"no {'answer' if sample.prompt else 'prompt'}"
            )
    texts = iter(_texts(prepared, config, progress))
    splits, wrong = {}, 0
    for name, problems in corpus.splits.items():
        solved = [_solved(problem, next(texts)) for problem in problems]
        right = [own for own, problem in zip(solved, problems, strict=True) if own.answer == problem.answer.strip()]
        wrong += len(solved) - len(right)
        splits[name] = right if config.wrong_answers == "drop" else solved
        if not splits[name]:
            raise DataError(
                f"{config.dataset}: expected {name} problems that the teacher solves (its answer after "
                f"{ANSWER_MARK!r}), found none among {len(problems)}. Choose --wrong-answers keep, more "
                "--max-new-tokens, or another teacher"
            )
    own = Corpus(corpus.name, splits)
    tokens = tokenize(chain.from_iterable(splits.values()), prepared.tokenizer, prepared.manifest.max_tokens)
    return replace(prepared, corpus=own, tokens=list(tokens), wrong_answers=wrong)


def _solved(problem: Sample, text: str) -> Sample:
    """The problem with the reasoning and the answer of a generated text."""
    reasoning, _, _ = text.partition(ANSWER_MARK.strip())
    return replace(problem, reasoning=reasoning.strip("\n"), answer=extract_answer(text) or "")


def _texts(prepared: Prepared, config: ExtractConfig, progress: Progress) -> list[str]:
    """What the teacher says to every prompt, in the order of the samples."""
    prompts = [prompt_ids(sample).tolist() for sample in prepared.tokens]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    task = progress.add_task("reasoning", total=len(order), status="")
    texts = [""] * len(prompts)
    draft = _Draft(draft_path(config.store), prepared.manifest.hash)
    for number, batch in enumerate(chunks(order, GENERATION_BATCH)):
        if number >= len(draft.batches):
            draft.add(_continue(prepared, config, [prompts[i] for i in batch], number))
        for i, text in zip(batch, draft.batches[number], strict=True):
            texts[i] = text
        progress.update(task, advance=len(batch))
    return texts


def _continue(prepared: Prepared, config: ExtractConfig, prompts: list[list[int]], number: int) -> list[str]:
    room = min(config.max_new_tokens, prepared.manifest.max_tokens - max(map(len, prompts)))
    if room < 1:
        return [""] * len(prompts)
    # Of the batch alone, so that what was interrupted goes on as it would have.
    torch.manual_seed(int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0]))
    return generate_texts(prepared.teacher, prepared.tokenizer, prompts, room, config.temperature)


def draft_path(store: Path) -> Path:
    """Where the texts of an extraction that is not yet a store are kept."""
    return store.with_name(f".{store.name}.reasoning.jsonl")


class _Draft:
    """The texts of the batches that are done, a line each, after a line that says of which extraction."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        header, *batches = _whole_lines(path) or [""]
        self.batches: list[list[str]] = batches if header == identity else []
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(f"{json.dumps(line)}\n" for line in [identity, *self.batches]).encode())

    def add(self, texts: list[str]) -> None:
        """Keep a batch, on the disk before the next begins."""
        self.batches.append(texts)
        with self._path.open("a") as file:
            file.write(f"{json.dumps(texts)}\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[Any]:
    """What of a draft can be read: a killed process may leave half a line, a damaged draft is none."""
    try:
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    except (FileNotFoundError, ValueError):
        return []
