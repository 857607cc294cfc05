"""What is planned is what is paid; and nothing stays of the measurement."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from kvpipe.kvcache.errors import StoreError
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.plan import Plan, Rates, make_plan

PLAN = Plan(
    samples=10,
    tokens=1000,
    truncated=0,
    store_bytes=10,
    query_bytes=0,
    missing_bytes=10,
    raw_bytes=20,
    free_bytes=10,
    rates=None,
)
RATES = Rates(forward=100.0, extract=50.0, read=1000.0)


@pytest.mark.parametrize(
    ("codec", "layers", "queries", "budget"),
    [("raw", "all", False, None), ("int4", "ratio:2", False, None), ("int4", "ratio:2", True, 0.5)],
)
def test_the_plan_is_what_the_extraction_takes(
    tmp_path: Path, codec: str, layers: str, queries: bool, budget: float | None
) -> None:
    kept = {"codec": codec, "layers": layers, "queries": queries, "evict": "random" if budget else "none"}
    config = ExtractConfig(
        "qwen", tmp_path / "here" / "x.zarr", samples=60, eval_samples=8, max_tokens=60, budget=budget, **kept
    )
    plan = make_plan(config)
    assert list(tmp_path.iterdir()) == []
    store = extract(config).store
    assert (plan.samples, plan.tokens, plan.truncated) == (76, store.length.sum(), store.truncated)
    files = [path for shard in range(store.num_shards) for path in store.shard_paths(shard)]
    ledger = [store.ledger.path(shard) for shard in range(store.num_shards)]
    # Beside them, before it is compressed: 13 bytes a token, 5 a sample (9 with eviction), and the text.
    beside = 13 * plan.tokens + (9 if store.evicts else 5) * plan.samples + store.group["text"].nbytes
    assert plan.store_bytes == sum(path.stat().st_size for path in [*files, *ledger]) + beside
    of_queries = sum(path.stat().st_size for path in files if "queries" in path.parts)
    in_ledger = 8 * store.group["queries"].shape[3] // 32 * store.num_shards * store.layout.samples if queries else 0
    assert plan.query_bytes == of_queries + in_ledger
    assert (plan.query_bytes > 0) == queries
    assert plan.store_bytes < plan.raw_bytes if codec == "int4" else plan.store_bytes == plan.raw_bytes
    assert plan.rates is not None
    assert min(plan.rates.forward, plan.rates.extract, plan.rates.read) > 0


def test_without_room_for_the_measurement_sizes_are_still_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk cannot be had in a test, so it is the answer of the system that is changed."""
    config = ExtractConfig("qwen", tmp_path / "x.zarr", samples=60, eval_samples=8)
    measured = make_plan(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    plan = make_plan(config)
    assert not plan.fits
    assert plan == replace(measured, free_bytes=1000, rates=None)
    assert list(tmp_path.iterdir()) == []


def test_of_a_store_that_is_there_only_the_rest_has_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExtractConfig("qwen", tmp_path / "x.zarr", samples=60, eval_samples=8, max_shard_bytes=2_000_000)
    before = make_plan(config)
    assert before.missing_bytes == before.store_bytes
    store = extract(config).store
    assert (store.num_shards > 2, store.missing_bytes) == (True, 0)
    assert make_plan(config).missing_bytes == 0
    rest = [store.ledger.path(1), *store.shard_paths(1)]
    size = sum(path.stat().st_size for path in rest)
    store.ledger.path(1).unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    plan = make_plan(config)
    assert (plan.missing_bytes, plan.fits) == (size, False)
    with pytest.raises(StoreError, match=r"not enough space for .*x\.zarr"):
        extract(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    assert extract(config).store.complete
    for refused in (make_plan, extract):
        with pytest.raises(StoreError, match=r"holds another extraction \(codec differs\)"):
            refused(replace(config, codec="int8"))


def test_no_plan_is_made_for_a_place_that_extract_refuses(tmp_path: Path) -> None:
    (tmp_path / "notes.zarr").write_text("mine")
    config = ExtractConfig("qwen", tmp_path / "notes.zarr", samples=60, eval_samples=8)
    for refused in (make_plan, extract):
        with pytest.raises(StoreError, match=r"notes\.zarr is taken: expected a free place.*found a file"):
            refused(config)
    assert (tmp_path / "notes.zarr").read_text() == "mine"


@pytest.mark.parametrize("runs", range(1, 6))
def test_from_the_break_even_on_the_store_is_cheaper(runs: int) -> None:
    """In seconds: 20 to extract and 1 a run to read, or 10 a run for the teacher."""
    assert RATES.break_even is not None
    assert (20 + 1 * runs < 10 * runs) == (runs >= RATES.break_even)


def test_a_teacher_as_fast_as_the_disk_needs_no_store() -> None:
    assert replace(RATES, read=100.0).break_even is None


def test_what_does_not_fit_is_said() -> None:
    assert PLAN.fits
    assert not replace(PLAN, missing_bytes=11).fits
