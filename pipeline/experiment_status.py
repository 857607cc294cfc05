"""How far an experiment is, read from its folders: any terminal can ask."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..kvcache.errors import ConfigError, KVPipeError
from ..kvcache.lock import is_held
from ..kvcache.store import KVStore
from .config import DistillConfig
from .experiment_config import ExperimentConfig
from .run_directory import RunDirectory
from .run_log import failure

RunState = Literal["finished", "running", "failed", "waiting", "damaged", "other"]


@dataclass(frozen=True)
class RunStatus:
    """One run or extraction: its state, and of a running one its progress, of a failed or damaged one its error. In the
    folder of an `other` lies a run of another recipe. `seconds` is how long a finished run took."""

    name: str
    state: RunState
    said: str = ""
    seconds: float | None = None


def experiment_status(config: ExperimentConfig, runs_dir: Path) -> list[RunStatus]:
    """Every run of the grid, in the order of running."""
    return [_status(runs_dir / run.name, run.recipe) for run in config.runs]


def store_status(config: ExperimentConfig) -> list[RunStatus]:
    """Every extraction that the runs wait for."""
    return [_store_status(extraction.store) for extraction in config.extractions]


def seconds_left(runs: Sequence[RunStatus]) -> float | None:
    """If what is left takes as long as what is finished, side by side as now; None while that is not known."""
    took = [run.seconds for run in runs if run.seconds is not None]
    side_by_side = sum(run.state == "running" for run in runs)
    left = sum(run.state in ("running", "waiting") for run in runs)
    return sum(took) / len(took) * left / side_by_side if took and side_by_side else None


def _status(path: Path, recipe: DistillConfig) -> RunStatus:
    # A run that ends in between has its record before it gives its marker back: the marker is looked at first.
    run, running = RunDirectory(path), is_held(path)
    try:
        record = run.read_record()
    except ConfigError as error:
        return RunStatus(path.name, "damaged", str(error))
    if record is not None and record["config"] != recipe.to_dict():
        return RunStatus(path.name, "other", "the folder holds another run")
    if record is not None:
        return RunStatus(path.name, "finished", seconds=float(record["seconds"]["total"]))
    if running:
        return RunStatus(path.name, "running", progress_of(run))
    said = failure(path)
    return RunStatus(path.name, "failed", said) if said else RunStatus(path.name, "waiting", progress_of(run))


def _store_status(path: Path) -> RunStatus:
    # As of runs: the marker is looked at first.
    unfinished: RunState = "running" if is_held(path) else "waiting"
    if not path.exists():
        return RunStatus(str(path), unfinished)
    try:
        store = KVStore.open(path)
    except KVPipeError as error:
        return RunStatus(str(path), "damaged", str(error))
    shards = f"{len(store.finished_shards())} of {store.num_shards} shards"
    return RunStatus(str(path), "finished" if store.complete else unfinished, shards)


def progress_of(run: RunDirectory) -> str:
    """The latest step and losses, where anyone can read them: in the run's metrics file, which is another run's until
    it begins. Empty before."""
    logs: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        logs = [entry for entry in run.read_metrics() if "loss" in entry]
    if not logs:
        return ""
    losses = "".join(f" · {part} {logs[-1][part]:.3f}" for part in ("ce", "kv") if part in logs[-1])
    return f"step {logs[-1]['step']}{losses}"
