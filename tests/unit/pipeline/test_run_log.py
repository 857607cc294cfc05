"""What a run that failed says last is found again."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvpipe.pipeline.run_log import failed, failure, log_path


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("no disk", "no disk"),
        ("CUDA error\n  at line 3\n\nCompile it\n", "CUDA error at line 3 Compile it"),
    ],
)
def test_an_error_is_found_on_whatever_many_lines_it_came(tmp_path: Path, error: str, said: str) -> None:
    log_path(tmp_path / "run").write_text(f"step 1\nError: a word of the training text\nstep 2\n{failed(error)}\n")
    assert failure(tmp_path / "run") == said


@pytest.mark.parametrize("log", [None, "", "step 1\n", "Error: of another time\nstep 1\n"])
def test_a_run_that_goes_on_or_was_interrupted_has_not_failed(tmp_path: Path, log: str | None) -> None:
    if log is not None:
        log_path(tmp_path / "run").write_text(log)
    assert failure(tmp_path / "run") == ""
