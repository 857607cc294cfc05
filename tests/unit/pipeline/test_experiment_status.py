"""What is said of a grid's runs, from their folders alone."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kvpipe.kvcache.lock import lock_path, only_writer
from kvpipe.pipeline.experiment_status import RunStatus, experiment_status, seconds_left, store_status
from kvpipe.pipeline.run_log import log_path

ARMS = {"none": 0.9, "flat": 0.4}


def test_runs_are_finished_running_failed_or_waiting(make_experiment: Callable[..., Any]) -> None:
    missing = dict.fromkeys(("flat-seed1", "none-seed2", "flat-seed2"), "missing")
    finished = make_experiment(ARMS, seeds=3, without=missing)
    runs: Path = finished.runs_dir
    log_path(runs / "none-seed2").write_text("something\n\nError: the store has fewer samples\n")
    log_path(runs / "flat-seed2").write_text("a library's warning, and then a signal\n")
    running = runs / "flat-seed1"
    running.mkdir()
    (running / "metrics.jsonl").write_text('{"step": 10, "loss": 2.0, "ce": 1.5, "kv": 0.5}\n{"step": 20, "los')
    with only_writer(running):
        found = experiment_status(finished.config, runs)
    assert found == [
        RunStatus("none-seed0", "finished", seconds=8.0),
        RunStatus("flat-seed0", "finished", seconds=8.0),
        RunStatus("none-seed1", "finished", seconds=9.0),
        RunStatus("flat-seed1", "running", "step 10 · ce 1.500 · kv 0.500"),
        RunStatus("none-seed2", "failed", "the store has fewer samples"),
        RunStatus("flat-seed2", "waiting"),
    ]
    # One runs at a time, two are left.
    assert seconds_left(found) == pytest.approx(2 * 25 / 3)
    # The process is gone, its marker too: the run goes on when the command is repeated.
    assert experiment_status(finished.config, runs)[3].state == "waiting"


def test_extractions_are_seen_as_well(make_experiment: Callable[..., Any], tmp_path: Path) -> None:
    config = make_experiment(ARMS, seeds=1).config
    (whole,) = store_status(config)
    assert (whole.name, whole.state, whole.said) == (str(config.extract.store), "finished", "1 of 1 shards")
    later = replace(config, extract=replace(config.extract, store=tmp_path / "later.zarr"))
    assert store_status(later) == [RunStatus(str(tmp_path / "later.zarr"), "waiting")]
    with only_writer(tmp_path / "later.zarr"):
        assert store_status(later)[0].state == "running"
    (tmp_path / "later.zarr").mkdir()
    assert store_status(later)[0].state == "damaged"


def test_a_damaged_run_hides_none_of_the_others(make_experiment: Callable[..., Any]) -> None:
    finished = make_experiment(ARMS, seeds=1)
    record = finished.runs_dir / "none-seed0" / "run.json"
    record.write_text(record.read_text().replace("0.9", "0.1", 1))
    damaged, other = experiment_status(finished.config, finished.runs_dir)
    assert (damaged.state, other.state) == ("damaged", "finished")
    assert "none-seed0 is damaged" in damaged.said


def test_a_run_of_another_recipe_is_not_this_experiments(make_experiment: Callable[..., Any]) -> None:
    finished = make_experiment(ARMS, seeds=1)
    config = finished.config
    config = replace(config, arms={**config.arms, "flat": replace(config.arms["flat"], kv_weight=2.0)})
    assert [run.state for run in experiment_status(config, finished.runs_dir)] == ["finished", "other"]


@pytest.mark.parametrize(("holder", "held"), [("999999999", False), ("not a number", False), ("1", True)])
def test_a_run_goes_on_where_its_process_lives(make_experiment: Callable[..., Any], holder: str, held: bool) -> None:
    finished = make_experiment(ARMS, seeds=1, without={"flat-seed0": "missing"})
    lock_path(finished.runs_dir / "flat-seed0").write_text(f"{holder}\n{socket.gethostname()}\n")
    state = experiment_status(finished.config, finished.runs_dir)[1].state
    assert (state == "running") is held


def test_another_hosts_process_is_taken_at_its_word(make_experiment: Callable[..., Any]) -> None:
    finished = make_experiment(ARMS, seeds=1, without={"flat-seed0": "missing"})
    lock_path(finished.runs_dir / "flat-seed0").write_text("1234\nelsewhere\n")
    assert experiment_status(finished.config, finished.runs_dir)[1].state == "running"


def test_what_is_left_is_not_known_before_the_first_is_finished() -> None:
    assert seconds_left([RunStatus("a", "running"), RunStatus("b", "waiting")]) is None
    assert seconds_left([RunStatus("a", "finished", seconds=3.0)]) is None
