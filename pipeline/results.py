"""From finished runs to numbers: scores by arm and seed, comparisons, claims, and what the store saved."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..kvcache.errors import ConfigError
from ..kvcache.store import KVStore
from ..kvcache.summary import summarise
from .claims import Claim, claims
from .declaration import changed_since, declaration
from .experiment_config import ExperimentConfig, run_name
from .finished_runs import ExperimentRuns
from .held_out_scores import CheckpointPair, HeldOutScores, checkpoint_pairs, read_scores, sample_differences
from .questions import COMPARED_METRICS, Question
from .run_directory import RunDirectory
from .split_hygiene import split_hashes
from .stats import Comparison, adjust, compare, distribution_free
from .teacher_weights import teacher_weights

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class RunResult:
    """One finished run: its scores, its learning curve of (step, held-out cross-entropy) and, of several teachers, how
    much each counted by step."""

    name: str
    arm: str
    seed: int
    scores: dict[str, float]
    curve: Curve
    weights: list[tuple[int, list[float]]]
    record: dict[str, Any]


@dataclass(frozen=True)
class Savings:
    """Measured seconds, and what they would have been with the teacher in every run.

    `online_seconds` takes the same measured parts, with a pass of its stores' teachers in every run. A loop that
    asks the teacher again each epoch would cost more.
    """

    teacher_seconds: float
    student_seconds: float
    runs: int
    offline_seconds: float
    online_seconds: float


@dataclass(frozen=True)
class Results:
    """All that a report shows. `declared` is what the experiment file says of it, `changed` what of that it said
    otherwise before the first run was finished (None: not known), `unrun` the runs still to come, `command` what runs
    all of it, `versions` what the statistics were made with."""

    name: str
    primary_metric: str
    declared: dict[str, Any]
    changed: list[str] | None
    runs: list[RunResult]
    failures: dict[str, str]
    unrun: list[str]
    comparisons: dict[str, list[Comparison]]
    claims: list[Claim]
    checkpoint_pairs: list[CheckpointPair]
    savings: Savings
    stores: list[dict[str, Any]]
    splits: dict[str, dict[str, str]]
    arm_stores: dict[str, list[str]]
    command: str
    extractions: list[str]
    commands: dict[str, str]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))

    def runs_of(self, arm: str) -> list[RunResult]:
        return [run for run in self.runs if run.arm == arm]

    def bytes_per_token(self, arm: str) -> float:
        """Of the stores that an arm reads, on disk, for each token of the first."""
        stores = {store["path"]: store for store in self.stores}
        read = [stores[path] for path in self.arm_stores[arm]]
        return sum(float(s["bytes_per_token"]) * s["tokens"] for s in read) / int(read[0]["tokens"])


def collect(config: ExperimentConfig, outcome: ExperimentRuns, runs_dir: Path) -> Results:
    """Gather and compare. Raises ConfigError where two runs that are compared are not a pair."""
    runs = [
        _run_result(run.name, run.arm, run.recipe.seed, outcome.records[run.name], runs_dir)
        for run in config.runs
        if run.name in outcome.records
    ]
    _require_pairs(config, runs)
    scores = {(run.arm, run.seed): read_scores(RunDirectory(runs_dir / run.name)) for run in runs}
    stores = [KVStore.open(extraction.store) for extraction in config.extractions]
    unrun = [run.name for run in config.runs if run.name not in outcome.records.keys() | outcome.failures.keys()]
    comparisons = {metric: _compare_all(config, runs, scores, unrun, metric) for metric in _metrics(config)}
    return Results(
        name=config.name,
        primary_metric=config.primary_metric,
        declared=declaration(config),
        changed=changed_since(config, runs_dir),
        runs=runs,
        failures=outcome.failures,
        unrun=unrun,
        comparisons=comparisons,
        claims=claims(config, comparisons[config.primary_metric]),
        checkpoint_pairs=[
            pair for question in _without_margins(config.comparisons) for pair in checkpoint_pairs(question, scores)
        ],
        savings=_savings(config, runs, stores),
        stores=[summarise(store) for store in stores],
        splits={str(store.path): split_hashes(store) for store in stores},
        arm_stores={arm: _places(config, arm) for arm in config.arms},
        command=config.command,
        versions={name: version(name) for name in ("kvpipe", "scipy", "statsmodels")},
        extractions=[shlex.join(["kvpipe", "extract", *e.flags()]) for e in config.extractions],
        commands={
            arm: shlex.join(["kvpipe", "distill", *_store_flags(config, arm), *recipe.flags()])
            for arm, recipe in config.arms.items()
        },
    )


def _places(config: ExperimentConfig, arm: str) -> list[str]:
    return [str(extraction.store) for extraction in config.stores_of(arm)]


def _store_flags(config: ExperimentConfig, arm: str) -> list[str]:
    return [flag for place in _places(config, arm) for flag in ("--store", place)]


def _metrics(config: ExperimentConfig) -> list[str]:
    """The primary metric first."""
    return list(dict.fromkeys([config.primary_metric, *COMPARED_METRICS]))


def _run_result(name: str, arm: str, seed: int, record: dict[str, Any], runs_dir: Path) -> RunResult:
    logs = RunDirectory(runs_dir / name).read_metrics()
    evaluated = [(int(entry["step"]), _held_out(entry)) for entry in logs if "eval_ce" in entry]
    scores = {metric: value for metric, value in record["metrics"].items() if value is not None}
    if not evaluated or evaluated[-1][0] < record["steps"]:
        evaluated.append((int(record["steps"]), scores))
    curve = [(step, float(metrics["ce"])) for step, metrics in evaluated]
    weights = [(step, found) for step, metrics in evaluated if (found := teacher_weights(metrics))]
    scores["ce_auc"] = _area(curve)
    return RunResult(name, arm, seed, scores, curve, weights, record)


def _held_out(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a line of a log says of held-out text, under the names of metrics."""
    return {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}


def _area(curve: Curve) -> float:
    """Mean height of a learning curve between its first and last point."""
    steps, values = np.array([s for s, _ in curve], float), np.array([v for _, v in curve], float)
    if len(curve) < 2 or steps[-1] == steps[0]:
        return float(values.mean())
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def _require_pairs(config: ExperimentConfig, runs: list[RunResult]) -> None:
    """Runs of one seed that are compared must share the initial student, the data order, the evaluation samples, and
    how much they were trained."""
    by_run = {(run.arm, run.seed): run for run in runs}
    for question in config.comparisons:
        for seed in config.seeds:
            pair = [by_run[arm, seed] for arm in (question.arm, question.control) if (arm, seed) in by_run]
            ours, *theirs = [{**run.record["pairing"], **_compute(run)} for run in pair] or [{}]
            if theirs and theirs[0] != ours:
                raise ConfigError(
                    f"{pair[0].name} and {pair[1].name} are not a pair",
                    expected=theirs[0],
                    found=ours,
                    remedy="Arms that are compared must not change the student, the batches or the evaluation split",
                )


def _compute(run: RunResult) -> dict[str, int]:
    return {name: run.record[name] for name in ("steps", "tokens")}


def _compare_all(
    config: ExperimentConfig,
    runs: list[RunResult],
    scores: Mapping[tuple[str, int], HeldOutScores],
    unrun: Sequence[str],
    metric: str,
) -> list[Comparison]:
    """One family: Holm's correction spans all comparisons of a metric."""
    by_arm: dict[str, dict[int, float]] = {arm: {} for arm in config.arms}
    for run in runs:
        if metric in run.scores:
            by_arm[run.arm][run.seed] = run.scores[metric]

    def answer(asked: Question) -> Comparison:
        pair = by_arm[asked.arm], by_arm[asked.control]
        seeds = sorted(pair[0].keys() & pair[1].keys())
        compared = compare(asked, metric, *pair, sample_differences(asked, metric, seeds, scores))
        missing = tuple(seed for seed in config.seeds if seed not in seeds)
        to_come = tuple(s for s in missing if {run_name(arm, s) for arm in (asked.arm, asked.control)} & set(unrun))
        return replace(distribution_free(compared), missing_seeds=missing, unrun_seeds=to_come)

    questions = config.comparisons if metric == config.primary_metric else _without_margins(config.comparisons)
    return adjust([answer(question) for question in questions])


def _without_margins(questions: Iterable[Question]) -> list[Question]:
    """Every pair once: a margin is in the units of the primary metric."""
    return list(dict.fromkeys(replace(question, margin=None) for question in questions))


def arm_summary(results: Results, metric: str) -> Mapping[str, tuple[float, float, int]]:
    """Mean, standard deviation over seeds and number of seeds of every arm."""
    found = {}
    for arm in results.arms():
        values = [run.scores[metric] for run in results.runs_of(arm) if metric in run.scores]
        if values:
            found[arm] = (
                float(np.mean(values)),
                float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"),
                len(values),
            )
    return found


def _savings(config: ExperimentConfig, runs: list[RunResult], stores: list[KVStore]) -> Savings:
    teacher = {store.path: float(store.extraction["seconds"]) for store in stores}
    with_kv = [run for run in runs if run.record["config"]["mode"] != "none"]
    students = [float(run.record["seconds"]["total"]) for run in with_kv]
    own_teachers = [teacher[read.store] for run in with_kv for read in config.stores_of(run.arm)]
    return Savings(
        teacher_seconds=sum(teacher.values()),
        student_seconds=float(np.mean(students)) if students else 0.0,
        runs=len(with_kv),
        offline_seconds=sum(teacher.values()) + sum(students),
        online_seconds=sum(own_teachers) + sum(students),
    )
