"""Input as it comes: samples longer than the limit, and GSM8K where it is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def test_truncation_is_counted_and_never_silent(kvpipe: Any, teacher: Path, tmp_path: Path) -> None:
    extract, as_json, shown, distilled = kvpipe.many(
        [
            ["extract", "--model", teacher, "--samples", 8, "--eval-samples", 2, "--max-tokens", 16],
            ["inspect", "stores/teacher.zarr", "--json"],
            ["inspect", "stores/teacher.zarr"],
            ["distill", "--output-dir", "run"],
        ],
        cwd=tmp_path,
    )
    assert "12 of 12 samples were cut at 16 tokens (--max-tokens)." in extract.stdout
    summary = json.loads(as_json.stdout)
    assert summary["truncated_samples"] == 12
    assert summary["tokens"] == 12 * 16
    assert summary["manifest"]["max_tokens"] == 16
    assert [line.split() for line in shown.stdout.splitlines() if "truncated" in line] == [
        ["truncated", "samples", "12"]
    ]
    assert distilled.code == 2
    assert distilled.error_lines == [
        "Error: the train samples of stores/teacher.zarr have nothing to learn: expected tokens of reasoning or "
        "answers, found prompts only, cut at 16 tokens. Extract again with more --max-tokens, or from samples with "
        "answers"
    ]
    assert not (tmp_path / "run").exists()


def test_gsm8k_goes_through_both_stages(kvpipe: Any, teacher: Path, root: Path, tmp_path: Path) -> None:
    dataset = root.parent / "shared" / "gsm8k" / "train.jsonl"
    if not dataset.exists():
        pytest.skip(f"GSM8K is not there: put its train.jsonl at {dataset} to run its whole path")
    extraction = ["--samples", 12, "--eval-samples", 3, "--dataset", dataset, "--max-tokens", 400]
    outcome = kvpipe("extract", "--model", teacher, *extraction, "--store", "gsm8k.zarr", cwd=tmp_path)
    assert "18 samples" in outcome.stdout
    kvpipe(
        *("distill", "--store", "gsm8k.zarr", "--mode", "structured", "--max-steps", 3, "--batch-size", 4),
        *("--max-new-tokens", 8, "--output-dir", "run"),
        cwd=tmp_path,
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["steps"] == 3
    assert record["teacher_forwards"] == 0
    assert record["metrics"]["exact_match"] is not None, "GSM8K's answers are found behind ####"
    predictions = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 3
    assert all(json.loads(line)["id"].startswith("train/") for line in predictions)
