"""Arms by seeds: every run a process of its own, finished runs never repeated."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress, TaskID

from ..kvcache.errors import ConfigError
from ..kvcache.lock import only_writer
from ..kvcache.store import KVStore
from .compatibility import stored_layer_map
from .declaration import declare
from .experiment_config import ExperimentConfig, PlannedRun
from .experiment_status import progress_of
from .extract import extract
from .fields import placed
from .finished_runs import ExperimentRuns, is_finished, read_records, require_comparable
from .models import num_student_layers, resolve_device
from .progress import progress_bar
from .ranks import require_one_process
from .run_directory import RunDirectory
from .run_process import RunProcess
from .trackers import require_trackers

POLL_SECONDS = 0.5


def run_experiment(
    config: ExperimentConfig, runs_dir: Path, jobs: int | None = None, report_to: Sequence[str] = ()
) -> ExperimentRuns:
    """Extract what is not complete, then run what is missing, `jobs` at a time: by default one a core, or
    one on a GPU. Cores are shared out evenly, and every run keeps to its own: none depends on its neighbours.

    A failed run is reported, not raised: the others go on. Raises ConfigError for `jobs` below one, for a tracker that
    is not installed, for held-out text that is in the training text, StoreError where another process runs the same
    experiment, and what `extract` raises.
    """
    require_one_process("experiment")
    require_trackers(report_to)
    on_gpu = resolve_device(config.extract.device).type == "cuda"
    if jobs is None:
        jobs = 1 if on_gpu else len(_cores())
    if jobs < 1:
        raise ConfigError("no such number of jobs", expected="at least 1", found=jobs, remedy="Mend --jobs")
    with only_writer(runs_dir):
        return _run(config, runs_dir, jobs, report_to, on_gpu=on_gpu)


def _run(
    config: ExperimentConfig, runs_dir: Path, jobs: int, report_to: Sequence[str], *, on_gpu: bool
) -> ExperimentRuns:
    stores = {extraction.store: extract(extraction).store for extraction in config.extractions}
    require_comparable(config, stores)
    if on_gpu:
        # The teacher is gone; what torch still holds for it, the runs can use.
        torch.cuda.empty_cache()
    waiting = [
        run
        for run in config.runs
        if not is_finished(runs_dir / run.name, run.recipe, [stores[place] for place in run.stores])
    ]
    _require_fitting(waiting, stores)
    # Of this grid or an earlier one: whoever has seen an answer asks no first question any more.
    if not any(runs_dir.glob("*/run.json")):
        declare(config, runs_dir)
    with progress_bar() as bar, _Grid(config, len(waiting), bar, shares_of_cores(_cores(), jobs)) as grid:
        while waiting or grid.active:
            while waiting and grid.free:
                run = waiting.pop(0)
                path, cores = runs_dir / run.name, grid.free.pop(0)
                device = config.extract.device
                grid.add(
                    path, RunProcess(run.recipe, run.stores, path, device=device, cores=cores, report_to=report_to)
                )
            time.sleep(POLL_SECONDS)
            grid.poll()
    return ExperimentRuns(read_records(config, runs_dir), grid.failures)


def _require_fitting(runs: Sequence[PlannedRun], stores: Mapping[Path, KVStore]) -> None:
    """Raise what an arm's first run would find of its layer map, before any other arm is trained."""
    arms = {run.arm: run for run in runs if run.recipe.layer_map != "cka"}
    depths = {student: num_student_layers(student) for student in {run.recipe.student for run in arms.values()}}
    for arm, run in arms.items():
        with placed(partial("arm {}, {}".format, arm), "layer_map"):
            for place in run.stores:
                stored_layer_map(run.recipe.layer_map, depths[run.recipe.student], stores[place])


def _cores() -> list[int]:
    """Those this process may use: a batch system often gives it fewer than the machine has."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def shares_of_cores(cores: Sequence[int], jobs: int) -> list[list[int]]:
    """Equally many for every job, as arithmetic depends on their number; each its own, unless there are more jobs than
    cores."""
    size = max(1, len(cores) // jobs)
    return [[cores[(job * size + place) % len(cores)] for place in range(size)] for job in range(jobs)]


@dataclass(frozen=True)
class _ActiveRun:
    process: RunProcess
    directory: RunDirectory
    task: TaskID


class _Grid:
    """The runs that go on now, each with its bar, under one bar for all; `free` are the shares of the cores that none
    of them uses. No run outlives the context."""

    def __init__(self, config: ExperimentConfig, waiting: int, bar: Progress, free: list[list[int]]) -> None:
        self.active: list[_ActiveRun] = []
        self.free = free
        self.failures: dict[str, str] = {}
        self._bar = bar
        self._total = len(config.runs)
        self._done = self._total - waiting
        self._task = bar.add_task(config.name, total=self._total, status="")
        self._show_total()

    def __enter__(self) -> _Grid:
        return self

    def __exit__(self, *_: object) -> None:
        for run in self.active:
            run.process.stop()

    def add(self, path: Path, process: RunProcess) -> None:
        task = self._bar.add_task(f"  {path.name}", total=None, status="starts")
        self.active.append(_ActiveRun(process, RunDirectory(path), task))

    def poll(self) -> None:
        """Show how far the runs are, and take out those that are over."""
        for run in list(self.active):
            self._show(run)
            if (exit_code := run.process.poll()) is not None:
                self.active.remove(run)
                self.free.append(run.process.cores)
                self._bar.remove_task(run.task)
                self._done += 1
                self._show_total()
                if exit_code != 0:
                    self.failures[run.directory.path.name] = run.process.last_word()

    def _show_total(self) -> None:
        self._bar.update(self._task, completed=self._done, status=f"{self._done}/{self._total} runs")

    def _show(self, run: _ActiveRun) -> None:
        if progress := progress_of(run.directory):
            self._bar.update(run.task, status=progress)
