"""The predecessor's trap on real KV: a teacher-side projection trained jointly lets its target shrink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLLAPSING = [
    *("distill", "--mode", "structured", "--direction", "teacher-to-student-joint", "--kv-weight", 10),
    *("--learning-rate", 0.01, "--aligner-learning-rate", 0.05, "--batch-size", 4, "--epochs", 20),
    *("--max-steps", 80, "--max-new-tokens", 4),
]


def test_the_joint_direction_collapses_and_the_monitor_says_so(kvpipe: Any, store: Path, tmp_path: Path) -> None:
    """--on-collapse stop fails the run, also when it is resumed from a checkpoint of the shrinking; warn records it."""
    stopped, resumed, warned = kvpipe.many(
        [
            [*COLLAPSING, "--store", store, "--output-dir", "stop", "--on-collapse", "stop"],
            [*COLLAPSING, "--store", store, "--output-dir", "stop", "--on-collapse", "stop"],
            [*COLLAPSING, "--store", store, "--output-dir", "warn", "--on-collapse", "warn"],
        ],
        cwd=tmp_path,
    )
    assert any((tmp_path / "stop" / "checkpoints").iterdir())
    for outcome in (stopped, resumed):
        assert outcome.code == 3, outcome.stderr
        (line,) = [line for line in outcome.error_lines if line.startswith("Error: ")]
        assert line == outcome.error_lines[-1]
        assert "the distillation target collapsed" in line
        assert "expected at least 10% of its initial variance" in line
        assert "--direction student-to-teacher" in line
        assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "stop" / "run.json").exists()

    assert warned.code == 0, warned.stderr
    assert "The distillation target collapsed during this run." in warned.stderr
    assert json.loads((tmp_path / "warn" / "run.json").read_text())["collapsed"] is True
    logs = map(json.loads, (tmp_path / "warn" / "metrics.jsonl").read_text().splitlines())
    losses = [entry for entry in logs if "target_variance" in entry]
    assert losses[-1]["target_variance"] < 0.1 * losses[0]["target_variance"]
    assert losses[-1]["kv"] < 0.1 * losses[0]["kv"], "the loss falls all the same"
