"""Arms by seeds from one store: every run a process of its own, finished runs never repeated."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from ..kvcache.errors import ConfigError
from ..kvcache.store import KVStore
from .callbacks import read_metrics
from .config import DistillConfig
from .experiment_config import ExperimentConfig
from .extract import extract
from .progress import progress_bar
from .run_directory import RunDirectory, run_identity

POLL_SECONDS = 0.5


@dataclass
class _ActiveRun:
    name: str
    process: subprocess.Popen[bytes]
    directory: RunDirectory
    task: TaskID


@dataclass(frozen=True)
class ExperimentRuns:
    """What came of the grid: records by run name, and the last line of what each failed run said."""

    records: dict[str, dict[str, Any]]
    failures: dict[str, str]
    wall_seconds: float


def run_experiment(config: ExperimentConfig, runs_dir: Path, jobs: int) -> ExperimentRuns:
    """Extract if the store is not complete, then run what is missing, `jobs` at a time.

    A failed run is reported, not raised: the others go on. Raises ConfigError for `jobs` below one, and
    what `extract` raises.
    """
    if jobs < 1:
        raise ConfigError("no such number of jobs", expected="at least 1", found=jobs, remedy="Mend --jobs")
    store = extract(config.extract).store
    waiting = [(name, recipe) for name, recipe in config.runs if not _is_finished(runs_dir / name, recipe, store)]
    start = time.perf_counter()
    failures: dict[str, str] = {}
    with progress_bar() as bar:
        done = len(config.runs) - len(waiting)
        total = bar.add_task(config.name, total=len(config.runs), completed=done, status="runs")
        active: list[_ActiveRun] = []
        with _terminated_on_exit(active):
            while waiting or active:
                while waiting and len(active) < jobs:
                    name, recipe = waiting.pop(0)
                    active.append(_start(name, recipe, config, runs_dir, jobs, bar))
                time.sleep(POLL_SECONDS)
                for run in list(active):
                    _show(run, bar)
                    if run.process.poll() is None:
                        continue
                    active.remove(run)
                    bar.remove_task(run.task)
                    bar.advance(total)
                    if run.process.returncode != 0:
                        failures[run.name] = _last_line(run.directory.path)
    records = {name: record for name, _ in config.runs if (record := RunDirectory(runs_dir / name).record)}
    return ExperimentRuns(records, failures, time.perf_counter() - start)


def _is_finished(path: Path, recipe: DistillConfig, store: KVStore) -> bool:
    """Whether the run is there already. Raises ConfigError where its folder holds another run."""
    run = RunDirectory(path)
    if run.record is None:
        return False
    run.claim(run_identity(recipe, store), overwrite=False)
    return True


def _start(
    name: str, recipe: DistillConfig, config: ExperimentConfig, runs_dir: Path, jobs: int, bar: Progress
) -> _ActiveRun:
    """Start `kvpipe distill` as a user would, with its share of the cores."""
    directory = RunDirectory(runs_dir / name)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    command = [sys.executable, "-m", "kvpipe.cli.app", "distill", "--store", str(config.extract.store)]
    command += ["--output-dir", str(directory.path), "--device", config.extract.device, *recipe.flags()]
    log = _log_path(directory.path)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
    return _ActiveRun(name, process, directory, bar.add_task(f"  {name}", total=None, status="starts"))


@contextmanager
def _terminated_on_exit(active: list[_ActiveRun]) -> Iterator[None]:
    """No run outlives the experiment, however it ends; each can be resumed."""
    try:
        yield
    finally:
        for run in active:
            run.process.terminate()
        for run in active:
            run.process.wait()


def _show(run: _ActiveRun, bar: Progress) -> None:
    """Read a run's progress where anyone can: in its metrics file."""
    logs = [entry for entry in read_metrics(run.directory.metrics) if "loss" in entry]
    if logs:
        status = " · ".join(f"{part} {logs[-1][part]:.3f}" for part in ("ce", "kv") if part in logs[-1])
        bar.update(run.task, completed=logs[-1]["step"], status=f"steps · {status}")


def _log_path(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.log")


def _last_line(run_dir: Path) -> str:
    lines = _log_path(run_dir).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
