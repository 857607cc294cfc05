"""Reports say what was asked before there was an answer, and what was asked after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from kvpipe.kvcache.errors import ConfigError
from kvpipe.pipeline.declaration import changed_since, declare
from kvpipe.pipeline.questions import Question
from kvpipe.pipeline.report import write_report
from kvpipe.pipeline.results import collect

ARMS = {"none": 0.9, "flat": 0.4}


def test_what_a_file_changes_after_the_first_run_is_named(make_experiment: Callable[..., Any]) -> None:
    finished = make_experiment(ARMS)
    config, runs_dir = finished.config, finished.runs_dir
    assert changed_since(config, runs_dir) is None
    declare(config, runs_dir)
    assert changed_since(config, runs_dir) == []
    other = replace(config, primary_metric="exact_match", greater_is_better=True)
    assert changed_since(other, runs_dir) == ["primary_metric (was ce)", "greater_is_better (was false)"]
    wider = replace(config, comparisons=(Question("flat", "none", 0.1),))
    assert changed_since(wider, runs_dir) == ["comparisons"]
    tuned = replace(config, arms={**config.arms, "flat": replace(config.arms["flat"], kv_weight=2.0)})
    assert changed_since(tuned, runs_dir) == ["arms (flat)"]
    fewer = replace(config, arms={"none": config.arms["none"]})
    assert changed_since(fewer, runs_dir) == ["arms (flat)"]


@pytest.mark.parametrize("text", ["", "[1", "[1]", "3", "null", "[" * 100_000, '{"arms": 3}'])
def test_a_damaged_declaration_is_named(make_experiment: Callable[..., Any], text: str) -> None:
    finished = make_experiment(ARMS)
    (finished.runs_dir / "declaration.json").write_text(text)
    with pytest.raises(ConfigError, match=r"declaration\.json is damaged: .* Put it back, or delete it"):
        changed_since(finished.config, finished.runs_dir)


def test_a_report_says_whether_its_questions_came_first(make_experiment: Callable[..., Any]) -> None:
    finished = make_experiment(ARMS)
    config, runs_dir = finished.config, finished.runs_dir

    def said(config: Any) -> list[str]:
        page = write_report(collect(config, finished.outcome, runs_dir), runs_dir / "report")
        return [path.read_text() for path in (page, page.with_name("report.md"))]

    assert all("The file declares: primary metric ce" in text for text in said(config))
    declare(config, runs_dir)
    assert all("Declared before any run was finished: primary metric ce" in text for text in said(config))
    later = replace(config, comparisons=(Question("flat", "none", 0.1),))
    assert all("Changed since the first run was finished: comparisons. " in text for text in said(later))
