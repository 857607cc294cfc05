"""A run's folder: whose it is, how far it came, and what must never be deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kvpipe.kvcache.errors import ConfigError
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.run_directory import RunDirectory, run_identity

IDENTITY: dict[str, Any] = {"config": {"mode": "flat", "seed": 0}, "stores": ["f00"], "student": {}}
OTHER: dict[str, Any] = {"config": {"mode": "flat", "seed": 1}, "stores": ["f00"], "student": {}}
METRICS = {"ce": 3, "token_accuracy": 0.5, "exact_match": None}
RECORD: dict[str, Any] = {
    "config": IDENTITY["config"],
    "stores": [{"manifest": "f00"}],
    "student": {},
    "metrics": METRICS,
    "pairing": {},
    "parameters": {"student": 2, "aligner": 0},
    "seconds": dict.fromkeys(("setup", "train", "data_wait", "evaluation", "total"), 1.0),
    "steps": 1,
    "tokens": 9,
    "train_samples": 3,
    "common_samples": 3,
    "teacher_forwards": 0,
    "threads": 1,
    "collapsed": False,
    "absorbed": False,
    "router_collapsed": False,
    "versions": {"python": "3.11"},
    "kv_gradient_share": None,
    "data_wait_share": 0.1,
}


def finish(run: RunDirectory, record: dict[str, Any] = RECORD) -> None:
    run.metrics.write_text('{"step": 1}\n')
    run.predictions.write_text('{"id": "0"}\n')
    run.student.mkdir()
    (run.student / "model.safetensors").write_bytes(b"weights")
    run.finish(record)


def test_a_run_claims_a_new_or_empty_folder_and_may_come_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "flat")
    run.claim(IDENTITY, overwrite=False)
    assert run.read_record() is None
    run.claim(IDENTITY, overwrite=False)
    finish(run)
    run.claim(IDENTITY, overwrite=False)
    record = run.read_record()
    assert record is not None
    assert record["metrics"] == METRICS


def test_another_run_is_refused_by_the_field_that_differs(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(IDENTITY, overwrite=False)
    with pytest.raises(ConfigError, match=r"holds another run \(config.seed differs\): expected 1, found 0"):
        run.claim(OTHER, overwrite=False)
    assert json.loads((tmp_path / "config.json").read_text()) == IDENTITY


def test_overwrite_replaces_a_run_and_all_that_it_left(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(IDENTITY, overwrite=False)
    finish(run)
    run.claim(OTHER, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_overwrite_empties_the_folder_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    run = RunDirectory(tmp_path / "run")
    run.claim(IDENTITY, overwrite=False)
    finish(run)
    run.claim(OTHER, overwrite=True)
    assert (tmp_path / "run").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "run"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text('{"model_type": "qwen3"}')
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDirectory(tmp_path).claim(IDENTITY, overwrite=overwrite)
    assert (tmp_path / name).read_text() == '{"model_type": "qwen3"}'


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "predictions.jsonl"])
def test_every_flipped_bit_of_a_finished_run_is_seen(tmp_path: Path, name: str) -> None:
    run = RunDirectory(tmp_path)
    run.claim(IDENTITY, overwrite=False)
    finish(run)
    whole = (tmp_path / name).read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(damaged)
        if name == "run.json" and _same_json(damaged, whole):
            continue
        with pytest.raises(ConfigError, match=r"damaged: expected what kvpipe wrote, found .*\. Delete .*run\.json"):
            run.read_record()
    (tmp_path / name).write_bytes(whole)
    assert run.read_record() is not None


def _same_json(damaged: bytes, whole: bytes) -> bool:
    """One kind of white space in another's place."""
    try:
        return bool(json.loads(damaged) == json.loads(whole))
    except ValueError:
        return False


@pytest.mark.parametrize("document", ["[]", "{}", "null", '{"seal": 3}', '{"steps": '])
def test_a_record_that_is_none_is_refused(tmp_path: Path, document: str) -> None:
    (tmp_path / "run.json").write_text(document)
    with pytest.raises(ConfigError, match="damaged"):
        RunDirectory(tmp_path).read_record()


def test_a_finished_run_whose_student_is_damaged_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(IDENTITY, overwrite=False)
    finish(run)
    record = run.read_record()
    assert record is not None
    run.require_outputs(record)
    for content in (b"weightz", None):
        (run.student / "model.safetensors").unlink()
        if content:
            (run.student / "model.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match=r"student/model\.safetensors (fails its checksum|is missing)"):
            run.require_outputs(record)
    assert run.read_record() == record, "a report needs no weights"


def test_another_runs_record_with_all_that_it_counts_on_is_refused(tmp_path: Path) -> None:
    finished, other = RunDirectory(tmp_path / "finished"), RunDirectory(tmp_path / "other")
    finished.claim(IDENTITY, overwrite=False)
    finish(finished)
    other.claim(OTHER, overwrite=False)
    for name in ("run.json", "metrics.jsonl", "predictions.jsonl"):
        (other.path / name).write_bytes((finished.path / name).read_bytes())
    with pytest.raises(ConfigError, match=r"run\.json is that of another run\. Delete"):
        other.read_record()


def test_the_identity_is_the_recipe_and_the_store(make_segmented_store: Callable[..., tuple[KVStore, Any]]) -> None:
    store, _ = make_segmented_store([5, 6])
    identity = run_identity(DistillConfig(), [store])
    assert identity == {"config": DistillConfig().to_dict(), "stores": [store.manifest.hash], "student": {}}
    assert identity != run_identity(DistillConfig(seed=1), [store])
    assert json.loads(json.dumps(identity)) == identity


def test_a_student_on_disk_is_its_files(
    make_segmented_store: Callable[..., tuple[KVStore, Any]], tmp_path: Path
) -> None:
    """A configuration, a folder: whoever edits them has another student, and their path says nothing of it."""
    store, _ = make_segmented_store([5, 6])
    for student, file in (("mine.json", "mine.json"), ("mine", "mine/config.json"), ("mine", "mine/model.safetensors")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text('{"rope_theta": 10000}')
        config = DistillConfig(student=str(tmp_path / student))
        before = run_identity(config, [store])
        run = RunDirectory(tmp_path / "runs" / file)
        run.claim(before, overwrite=False)
        assert json.loads(json.dumps(before)) == before == run_identity(config, [store])
        (tmp_path / file).write_text('{"rope_theta": 10001}')
        with pytest.raises(ConfigError, match=rf"holds another run \(student\.{Path(file).name}\.crc32c differs\)"):
            run.require_free(run_identity(config, [store]), overwrite=False)


WRONG_RECORDS = {
    "no seconds": {"seconds": None},
    "seconds that are words": {"seconds": RECORD["seconds"] | {"train": "long"}},
    "no total": {"seconds": {"setup": 1.0}},
    "metrics that are words": {"metrics": METRICS | {"ce": "low"}},
    "nothing for cross-entropy": {"metrics": METRICS | {"ce": None}},
    "parameters in a list": {"parameters": [1, 2]},
    "no number of steps": {"steps": None},
    "no word of common samples": {"common_samples": None},
    "a share in words": {"data_wait_share": "all"},
    "no versions": {"versions": None},
    "a gradient in words": {"kv_gradient_share": "much"},
}


@pytest.mark.parametrize("wrong", WRONG_RECORDS.values(), ids=WRONG_RECORDS.keys())
def test_a_sealed_record_of_another_version_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    run = RunDirectory(tmp_path)
    run.claim(IDENTITY, overwrite=False)
    finish(run, RECORD | wrong)
    with pytest.raises(ConfigError, match=rf"is damaged: expected what kvpipe wrote, found {next(iter(wrong))} "):
        run.read_record()


def test_overwriting_never_deletes_what_the_run_reads(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "link").symlink_to("run/student")
    for inside in (tmp_path / "run", tmp_path / "run" / "student", tmp_path / "link"):
        with pytest.raises(ConfigError, match="--overwrite would delete"):
            run.require_outside([inside])
    run.require_outside([tmp_path, tmp_path / "running", tmp_path / "run" / "not there"])


def test_a_run_killed_before_it_said_what_it_is_can_be_claimed(tmp_path: Path) -> None:
    (tmp_path / "config.json.partial").write_text('{"conf')
    RunDirectory(tmp_path).claim(IDENTITY, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
