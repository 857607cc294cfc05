"""When an experiment is settled: nothing is left to run, and nothing to ask a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from kvpipe.kvcache.errors import ConfigError, StoreError
from kvpipe.pipeline.declaration import declare
from kvpipe.pipeline.finished_runs import finished_runs, settled_runs

MakeExperiment = Callable[..., Any]


@pytest.fixture
def finished(make_experiment: MakeExperiment) -> Any:
    found = make_experiment({"none": 1.0, "flat": 0.9})
    declare(found.config, found.runs_dir)
    return found


def test_a_finished_grid_is_settled(finished: Any) -> None:
    """Its teacher is nowhere: the records and the store are all there is."""
    outcome = settled_runs(finished.config, finished.runs_dir)
    assert outcome == finished_runs(finished.config, finished.runs_dir)
    assert outcome is not None
    assert len(outcome.records) == 12
    assert outcome.failures == {}


def test_a_run_to_come_is_to_be_run(finished: Any) -> None:
    (finished.runs_dir / "flat-seed3" / "run.json").unlink()
    assert settled_runs(finished.config, finished.runs_dir) is None


@pytest.mark.parametrize("changes", [{"samples": 7}, {"model": "another"}, {"codec": "int8"}])
def test_another_extraction_is_to_be_held_against_its_store(finished: Any, changes: dict[str, Any]) -> None:
    config = replace(finished.config, extract=replace(finished.config.extract, **changes))
    assert settled_runs(config, finished.runs_dir) is None


@pytest.mark.parametrize("changes", [{"codec": "int8"}, {"seed": 3}, {"segments": "answer"}, {"layers": "0"}])
def test_no_report_says_of_a_store_what_it_is_not(finished: Any, changes: dict[str, Any]) -> None:
    config = replace(finished.config, extract=replace(finished.config.extract, **changes))
    with pytest.raises(StoreError, match=r"holds another extraction \((codec|seed|segments|layers).* differs\)"):
        finished_runs(config, finished.runs_dir)


def test_layers_that_the_stores_teacher_has_not_are_refused(finished: Any) -> None:
    config = replace(finished.config, extract=replace(finished.config.extract, layers="99"))
    with pytest.raises(ConfigError, match="no such layers"):
        finished_runs(config, finished.runs_dir)


def test_a_store_that_is_gone_is_to_be_extracted(finished: Any, tmp_path: Any) -> None:
    config = replace(finished.config, extract=replace(finished.config.extract, store=tmp_path / "gone.zarr"))
    declare(config, finished.runs_dir)
    assert settled_runs(config, finished.runs_dir) is None


def test_runs_that_nobody_declared_are_not_settled(finished: Any) -> None:
    (finished.runs_dir / "declaration.json").unlink()
    assert settled_runs(finished.config, finished.runs_dir) is None
