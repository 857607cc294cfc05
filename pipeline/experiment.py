"""Arms by seeds from one store: every run a process of its own, finished runs never repeated."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from ..kvcache.errors import ConfigError
from ..kvcache.store import KVStore
from .callbacks import read_metrics
from .config import DistillConfig
from .experiment_config import ExperimentConfig
from .extract import extract
from .models import resolve_device
from .progress import progress_bar
from .run_directory import RunDirectory, run_identity
from .run_process import RunProcess

POLL_SECONDS = 0.5


@dataclass
class _ActiveRun:
    name: str
    process: RunProcess
    directory: RunDirectory
    task: TaskID


@dataclass(frozen=True)
class ExperimentRuns:
    """What came of the grid: records by run name, and the last line of what each failed run said."""

    records: dict[str, dict[str, Any]]
    failures: dict[str, str]
    wall_seconds: float


def run_experiment(config: ExperimentConfig, runs_dir: Path, jobs: int | None = None) -> ExperimentRuns:
    """Extract if the store is not complete, then run what is missing, `jobs` at a time: by default one a core, or
    one on a GPU.

    A failed run is reported, not raised: the others go on. Raises ConfigError for `jobs` below one, and
    what `extract` raises.
    """
    on_gpu = resolve_device(config.extract.device).type == "cuda"
    if jobs is None:
        jobs = 1 if on_gpu else os.cpu_count() or 1
    if jobs < 1:
        raise ConfigError("no such number of jobs", expected="at least 1", found=jobs, remedy="Mend --jobs")
    store = extract(config.extract).store
    if on_gpu:
        # The teacher is gone; what torch still holds for it, the runs can use.
        torch.cuda.empty_cache()
    waiting = [(name, recipe) for name, recipe in config.runs if not _is_finished(runs_dir / name, recipe, store)]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    start = time.perf_counter()
    failures: dict[str, str] = {}
    active: list[_ActiveRun] = []
    with progress_bar() as bar, _stopped_on_exit(active):
        done = len(config.runs) - len(waiting)
        total = bar.add_task(config.name, total=len(config.runs), completed=done, status="runs")
        while waiting or active:
            while waiting and len(active) < jobs:
                name, recipe = waiting.pop(0)
                path = runs_dir / name
                process = RunProcess(recipe, store.path, path, device=config.extract.device, threads=threads)
                task = bar.add_task(f"  {name}", total=None, status="starts")
                active.append(_ActiveRun(name, process, RunDirectory(path), task))
            time.sleep(POLL_SECONDS)
            for run in list(active):
                _show(run, bar)
                if (exit_code := run.process.poll()) is not None:
                    active.remove(run)
                    bar.remove_task(run.task)
                    bar.advance(total)
                    if exit_code != 0:
                        failures[run.name] = run.process.said
    records = {name: record for name, _ in config.runs if (record := RunDirectory(runs_dir / name).record)}
    return ExperimentRuns(records, failures, time.perf_counter() - start)


def _is_finished(path: Path, recipe: DistillConfig, store: KVStore) -> bool:
    """Whether the run is there already. Raises ConfigError where its folder holds another run."""
    run = RunDirectory(path)
    if run.record is None:
        return False
    run.require_free(run_identity(recipe, store), overwrite=False)
    return True


@contextmanager
def _stopped_on_exit(active: list[_ActiveRun]) -> Iterator[None]:
    """No run outlives the experiment, however it ends."""
    try:
        yield
    finally:
        for run in active:
            run.process.stop()


def _show(run: _ActiveRun, bar: Progress) -> None:
    """Read a run's progress where anyone can: in its metrics file."""
    logs = [entry for entry in read_metrics(run.directory.metrics) if "loss" in entry]
    if logs:
        status = " · ".join(f"{part} {logs[-1][part]:.3f}" for part in ("ce", "kv") if part in logs[-1])
        bar.update(run.task, completed=logs[-1]["step"], status=f"steps · {status}")
