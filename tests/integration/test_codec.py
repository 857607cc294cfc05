"""A store that keeps less: what a student learns from it, and what is said of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

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


def test_a_student_learns_from_the_tokens_that_were_kept(kvpipe: Any, tmp_path: Path) -> None:
    options = ["--segments", "reasoning,answer", "--evict", "rkv", "--budget", "0.5", "--codec", "int8"]
    kvpipe(*EXTRACT, *options, "--store", "x.zarr", cwd=tmp_path)
    kvpipe("verify", "x.zarr", cwd=tmp_path)
    summary = json.loads(kvpipe("inspect", "x.zarr", "--json", cwd=tmp_path).stdout)
    assert (summary["lossy"], summary["manifest"]["eviction"], summary["manifest"]["budget"]) == (True, "rkv", 0.5)
    assert re.fullmatch(r"int8, [1-4][0-9]% of the tokens \(reasoning, answer, rkv\)", summary["kept_as"])
    group = zarr.open_group(tmp_path / "x.zarr", mode="r")
    length, kept, segments = (group[name][...] for name in ("length", "kv_length", "segment_ids"))
    for sample in range(len(length)):
        eligible = (segments[sample] > 0).sum()
        assert kept[sample] == -(-eligible // 2)
        places = group["kv_position"][sample, : kept[sample]]
        assert (group["kv_position"][sample, kept[sample] :] == -1).all()
        assert (segments[sample][places] > 0).all()
        assert (np.diff(places) > 0).all()
        # R-KV keeps the last eight tokens, as far as its budget goes.
        assert set(places[-min(8, kept[sample]) :]) <= set(range(length[sample] - 8, length[sample])), sample
    kvpipe(*DISTILL, "--store", "x.zarr", "--output-dir", "run", cwd=tmp_path)
    store = json.loads((tmp_path / "run" / "run.json").read_text())["store"]
    assert store["lossy"] is True
    assert store["tokens_kept"] == pytest.approx(kept.sum() / length.sum())


def test_eviction_without_effect_is_the_whole_store(kvpipe: Any, tmp_path: Path) -> None:
    """A budget of every token gives the student that all tokens give, to the last bit."""
    kvpipe(*EXTRACT, "--store", "all.zarr", cwd=tmp_path)
    longest = int(zarr.open_group(tmp_path / "all.zarr", mode="r")["length"][...].max())
    kvpipe(*EXTRACT, "--store", "budget.zarr", "--evict", "rkv", "--budget", longest, cwd=tmp_path)
    for name in ("all", "budget"):
        kvpipe(*DISTILL, "--store", f"{name}.zarr", "--output-dir", name, cwd=tmp_path)
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("all", "budget")]
    assert weights[0] == weights[1]


def test_a_repaired_shard_keeps_the_same_tokens(kvpipe: Any, tmp_path: Path) -> None:
    options = ["--evict", "rkv", "--budget", "0.5", "--queries", "--max-shard-size", "400KB"]
    kvpipe(*EXTRACT, *options, "--store", "x.zarr", cwd=tmp_path)
    shards = sorted(path for path in tmp_path.glob("x.zarr/[kq]*/c/**/*") if path.is_file())
    before = [path.read_bytes() for path in shards]
    assert len(shards) > 4
    assert {path.relative_to(tmp_path).parts[1] for path in shards} == {"kv", "kv_length", "kv_position", "queries"}
    for path in (shards[0], max(tmp_path.glob("x.zarr/kv_position/c/*/0")), shards[-1]):
        path.write_bytes(b"")
    assert "damaged" in kvpipe("verify", "x.zarr", cwd=tmp_path, code=2).stderr
    kvpipe("repair", "x.zarr", cwd=tmp_path)
    assert [path.read_bytes() for path in shards] == before


def test_a_student_of_more_layers_than_were_kept_is_refused(kvpipe: Any, tmp_path: Path) -> None:
    """It would learn from other layers than it should, or from one of them twice."""
    kvpipe(*EXTRACT, "--layers", "0,1", "--store", "x.zarr", cwd=tmp_path)
    refused = kvpipe(*DISTILL, "--store", "x.zarr", "--output-dir", "run", cwd=tmp_path, code=2)
    assert "x.zarr lacks layers that the student learns from: expected 1, 3, found 0, 1." in refused.stderr
    assert "--layers ratio:2" in refused.stderr
    assert not (tmp_path / "run").exists()
