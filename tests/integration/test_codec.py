"""A store that keeps less: what a student learns from it, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXTRACT = ["extract", "--model", "qwen", "--samples", 40, "--eval-samples", 4]
DISTILL = ["distill", "--max-steps", 6, "--batch-size", 8, "--max-new-tokens", 2]


def test_keeping_only_the_layers_in_use_changes_nothing(kvpipe: Any, tmp_path: Path) -> None:
    for name, layers in (("all", "all"), ("used", "ratio:2")):
        kvpipe(*EXTRACT, "--layers", layers, "--store", f"{name}.zarr", cwd=tmp_path)
        kvpipe(*DISTILL, "--store", f"{name}.zarr", "--output-dir", name, cwd=tmp_path)
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("all", "used")]
    assert weights[0] == weights[1]
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / f"{name}.zarr" / "kv").rglob("*")) for name in ("all", "used")
    ]
    assert 0.45 < sizes[1] / sizes[0] < 0.55


def test_a_lossy_store_says_so(kvpipe: Any, tmp_path: Path) -> None:
    kvpipe(*EXTRACT, "--codec", "int4", "--store", "x.zarr", cwd=tmp_path)
    kvpipe("verify", "x.zarr", cwd=tmp_path)
    summary = json.loads(kvpipe("inspect", "x.zarr", "--json", cwd=tmp_path).stdout)
    assert summary["lossy"] is True
    assert summary["manifest"]["codec"] == "int4"
    assert summary["shape"]["channel"] == 32
    assert summary["bytes_per_token"] < 0.5 * summary["bytes_per_token_of_kv"]
    kvpipe(*DISTILL, "--store", "x.zarr", "--output-dir", "run", cwd=tmp_path)
    store = json.loads((tmp_path / "run" / "run.json").read_text())["store"]
    assert (store["codec"], store["lossy"], store["layers"]) == ("int4", True, [0, 1, 2, 3])


def test_a_student_of_more_layers_than_were_kept_is_refused(kvpipe: Any, tmp_path: Path) -> None:
    """It would learn from other layers than it should, or from one of them twice."""
    kvpipe(*EXTRACT, "--layers", "0,1", "--store", "x.zarr", cwd=tmp_path)
    refused = kvpipe(*DISTILL, "--store", "x.zarr", "--output-dir", "run", cwd=tmp_path, code=2)
    assert "x.zarr lacks layers that the student learns from: expected 1, 3, found 0, 1." in refused.stderr
    assert "--layers ratio:2" in refused.stderr
    assert not (tmp_path / "run").exists()
