"""A store that keeps less: what a student learns from it, and what is said of it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

EXTRACT = ["extract", "--model", "qwen", "--samples", 40, "--eval-samples", 4]
DISTILL = ["distill", "--max-steps", 6, "--batch-size", 8, "--max-new-tokens", 2]
LONGEST = 91
"""Tokens of the longest of these samples."""


COMMANDS = {
    "all": [*EXTRACT, "--store", "all.zarr"],
    "used": [*EXTRACT, "--layers", "ratio:2", "--store", "used.zarr"],
    "budget": [*EXTRACT, "--evict", "rkv", "--budget", LONGEST, "--store", "budget.zarr"],
    "int4": [*EXTRACT, "--codec", "int4", "--store", "int4.zarr"],
    "rkv": [
        *(*EXTRACT, "--segments", "reasoning,answer", "--evict", "rkv", "--budget", "0.5", "--codec", "int8"),
        *("--store", "rkv.zarr"),
    ],
    "first": [*EXTRACT, "--layers", "0,1", "--store", "first.zarr"],
    **{
        f"{command} {name}": [command, f"{name}.zarr", *options]
        for command, options in (("verify", []), ("inspect", ["--json"]))
        for name in ("int4", "rkv")
    },
    **{
        f"distill {name}": [*DISTILL, "--store", f"{name}.zarr", "--output-dir", name]
        for name in ("all", "used", "budget", "int4", "rkv", "first")
    },
}


@pytest.fixture(scope="session")
def folder(built_once: Any, kvpipe: Any) -> Path:
    """Stores and runs of all commands, and what these said. One process for them all: starting takes the longest."""

    def build(place: Path) -> None:
        outcomes = kvpipe.many(list(COMMANDS.values()), cwd=place)
        (place / "said.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes]))

    return built_once("smaller stores", build)


@pytest.fixture(scope="session")
def said(folder: Path) -> dict[str, Any]:
    """How every command ended. All ended well but one."""
    outcomes = dict(zip(COMMANDS, json.loads((folder / "said.json").read_text()), strict=True))
    assert {name for name, outcome in outcomes.items() if outcome["code"]} == {"distill first"}, outcomes
    return outcomes


def student(folder: Path, name: str) -> bytes:
    return (folder / name / "student" / "model.safetensors").read_bytes()


def store_of_run(folder: Path, name: str) -> Any:
    return json.loads((folder / name / "run.json").read_text())["stores"][0]


@pytest.mark.usefixtures("said")
def test_keeping_only_the_layers_in_use_changes_nothing(folder: Path) -> None:
    assert student(folder, "all") == student(folder, "used")
    sizes = [sum(file.stat().st_size for file in (folder / f"{n}.zarr" / "kv").rglob("*")) for n in ("all", "used")]
    assert 0.45 < sizes[1] / sizes[0] < 0.55


def test_a_lossy_store_says_so(folder: Path, said: dict[str, Any]) -> None:
    summary = json.loads(said["inspect int4"]["stdout"])
    assert summary["lossy"] is True
    assert summary["manifest"]["codec"] == "int4"
    assert summary["shape"]["channel"] == 32
    assert summary["bytes_per_token"] < 0.5 * summary["raw_bytes_per_token_of_kv"]
    store = store_of_run(folder, "int4")
    assert (store["codec"], store["lossy"], store["layers"]) == ("int4", True, [0, 1, 2, 3])


def test_a_student_learns_from_the_tokens_that_were_kept(folder: Path, said: dict[str, Any]) -> None:
    summary = json.loads(said["inspect rkv"]["stdout"])
    assert (summary["lossy"], summary["manifest"]["eviction"], summary["manifest"]["budget"]) == (True, "rkv", 0.5)
    assert re.fullmatch(r"int8, [1-4][0-9]% of the tokens \(reasoning, answer, rkv\)", summary["kept_as"])
    group = zarr.open_group(folder / "rkv.zarr", mode="r")
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
    store = store_of_run(folder, "rkv")
    assert store["lossy"] is True
    assert store["tokens_kept"] == pytest.approx(kept.sum() / length.sum())


@pytest.mark.usefixtures("said")
def test_eviction_without_effect_is_the_whole_store(folder: Path) -> None:
    """A budget of every token gives the student that all tokens give, to the last bit."""
    assert int(zarr.open_group(folder / "all.zarr", mode="r")["length"][...].max()) == LONGEST
    assert student(folder, "all") == student(folder, "budget")


def test_a_student_of_more_layers_than_were_kept_is_refused(folder: Path, said: dict[str, Any]) -> None:
    """It would learn from other layers than it should, or from one of them twice."""
    refused = said["distill first"]
    assert refused["code"] == 2
    assert "first.zarr lacks layers that the student learns from: expected 1, 3, found 0, 1." in refused["stderr"]
    assert "--layers 1,3, or all" in refused["stderr"]
    assert not (folder / "first").exists()


def test_a_repaired_shard_keeps_the_same_tokens(kvpipe: Any, tmp_path: Path) -> None:
    options = ["--evict", "rkv", "--budget", "0.5", "--queries", "--max-shard-size", "400KB"]
    kvpipe(*EXTRACT, *options, "--store", "x.zarr", cwd=tmp_path)
    shards = sorted(path for path in tmp_path.glob("x.zarr/[kq]*/c/**/*") if path.is_file())
    before = [path.read_bytes() for path in shards]
    assert len(shards) > 4
    assert {path.relative_to(tmp_path).parts[1] for path in shards} == {"kv", "kv_length", "kv_position", "queries"}
    for path in (shards[0], max(tmp_path.glob("x.zarr/kv_position/c/*/0")), shards[-1]):
        path.write_bytes(b"")
    verified, repaired = kvpipe.many([["verify", "x.zarr"], ["repair", "x.zarr"]], cwd=tmp_path)
    assert (verified.code, repaired.code) == (2, 0)
    assert "damaged" in verified.stderr
    assert [path.read_bytes() for path in shards] == before
