"""How finished runs did on every held-out sample, and what two of them show side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .crossed_bootstrap import SampleDifferences
from .questions import Question
from .run_directory import RunDirectory
from .stats import mcnemar_test


@dataclass(frozen=True)
class HeldOutScores:
    """Scores by sample for every metric that is a mean over samples, and how many tokens each sample has."""

    tokens: Float[np.ndarray, " M"]
    by_metric: Mapping[str, Float[np.ndarray, " M"]]


@dataclass(frozen=True)
class CheckpointPair:
    """Two students of one seed: how many samples only the one solves, only the other, and McNemar's exact p."""

    arm: str
    control: str
    seed: int
    only_arm: int
    only_control: int
    p_value: float


def read_scores(run: RunDirectory) -> HeldOutScores:
    """From `predictions.jsonl`; `exact_match` is there where every sample has an answer."""
    lines = [json.loads(line) for line in run.predictions.read_text(encoding="utf-8").splitlines()]
    exact = [line["exact"] for line in lines]
    by_metric = {name: np.array([line[name] for line in lines], float) for name in ("ce", "token_accuracy")}
    if None not in exact:
        by_metric["exact_match"] = np.array(exact, float)
    return HeldOutScores(np.array([line["tokens"] for line in lines], float), by_metric)


def sample_differences(
    question: Question, metric: str, seeds: Sequence[int], scores: Mapping[tuple[str, int], HeldOutScores]
) -> SampleDifferences | None:
    """Arm minus control by seed and sample; None for a metric that is no mean over samples, and without seeds."""
    pairs = [(scores[question.arm, seed], scores[question.control, seed]) for seed in seeds]
    if not pairs or not all(metric in side.by_metric for pair in pairs for side in pair):
        return None
    values = np.array([arm.by_metric[metric] - control.by_metric[metric] for arm, control in pairs])
    tokens = pairs[0][0].tokens
    return SampleDifferences(values, np.ones_like(tokens) if metric == "exact_match" else tokens)


def checkpoint_pairs(question: Question, scores: Mapping[tuple[str, int], HeldOutScores]) -> list[CheckpointPair]:
    """One for every seed of which both students answered."""
    found = []
    for seed in sorted({seed for arm, seed in scores if arm == question.arm}):
        sides = [scores.get((name, seed)) for name in (question.arm, question.control)]
        exact = [side.by_metric["exact_match"] == 1 for side in sides if side and "exact_match" in side.by_metric]
        if len(exact) == 2 and exact[0].size:
            found.append(CheckpointPair(question.arm, question.control, seed, *mcnemar_test(*exact)))
    return found
