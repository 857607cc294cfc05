"""What a user can get wrong: exit code 2, one line that says what to mend, no traceback, nothing half written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

NEW = ["--samples", 8, "--eval-samples", 2, "--store", "new.zarr"]
STORED = ["--samples", 24, "--eval-samples", 4, "--store", "stored.zarr"]
RUN = ["--store", "stored.zarr", "--max-steps", 1, "--output-dir", "new-run"]

EXPERIMENT = """
name = "{name}"
primary_metric = "ce"
greater_is_better = false
seeds = {seeds}
[extract]
model = "teacher"
samples = {samples}
[budget]
epochs = 1
[arms.flat]
mode = "flat"
[arms.none]
mode = "{mode}"
[[comparisons]]
arm = "{arm}"
control = "none"
"""
SOUND = {"name": "new", "seeds": "[1]", "samples": "8", "mode": "none", "arm": "flat"}
EXPERIMENTS = {
    "arm": EXPERIMENT.format(**{**SOUND, "arm": "nosuch"}),
    "mode": EXPERIMENT.format(**{**SOUND, "mode": "nosuch"}),
    "samples": EXPERIMENT.format(**{**SOUND, "samples": '"many"'}),
    "seeds": EXPERIMENT.format(**{**SOUND, "seeds": "[1, 1]"}),
    "field": EXPERIMENT.format(**SOUND).replace('mode = "none"', 'modus = "none"'),
    "missing": EXPERIMENT.format(**SOUND).replace("primary_metric", "secondary_metric"),
    "syntax": "name = ",
}


@dataclass(frozen=True)
class Case:
    """A command line, and words of its error."""

    argv: list[object]
    words: tuple[str, ...]


def _extract(*options: object, says: tuple[str, ...], model: str = "teacher", place: list[Any] = NEW) -> Case:
    return Case(["extract", "--model", model, *place, *options], says)


def _distill(*options: object, says: tuple[str, ...]) -> Case:
    return Case(["distill", *RUN, *options], says)


EXTRACT_CASES = {
    "unknown model": _extract(model="nosuch", says=("model 'nosuch'", "Two ways on", "kvpipe models")),
    "unknown hub model": _extract(model="org/nosuch", says=("model 'org/nosuch'", "the Hub did not give it")),
    "weights cut short": _extract(model="cut", says=("cannot load the model 'cut'", "Mend --model")),
    "config is not JSON": _extract(model="garbled", says=("'garbled'", "not a valid JSON file", "Mend --model")),
    "no tokenizer": _extract(model="speechless", says=("knows no words", "expected a vocabulary, found special")),
    "dtype": _extract("--dtype", "float17", says=("expected auto, float32", "found float17", "--dtype")),
    "device": _extract("--device", "quantum", says=("expected auto, cpu, cuda", "found quantum", "--device")),
    "other device": _extract("--device", "meta", says=("expected cpu or cuda, found meta", "--device")),
    "codec": _extract("--codec", "zip", says=("codec: expected raw, fp8, int8", "found zip", "--codec")),
    "layer 9": _extract("--layers", "1,9", says=("expected numbers from 0 to", "found 1,9", "--layers")),
    "layers": _extract("--layers", "top", says=("expected all, ratio:N, or numbers", "found top", "--layers")),
    "batch size 0": _extract("--batch-size", 0, says=("expected auto, or at least 1, found 0", "--batch-size")),
    "batch size word": _extract("--batch-size", "x", says=("expected auto, or at least 1, found x", "--batch-size")),
    "shard size": _extract("--max-shard-size", "big", says=("expected e.g. 64MB", "found big", "--max-shard-size")),
    "shard size 0": _extract("--max-shard-size", "0MB", says=("found 0MB", "--max-shard-size")),
    "max tokens 1": _extract("--max-tokens", 1, says=("expected 2 to 2048 tokens, found 1", "--max-tokens")),
    "max tokens many": _extract("--max-tokens", 4096, says=("expected 2 to 2048 tokens, found 4096",)),
    "reasoning": _extract("--reasoning", "student", says=("expected dataset or teacher, found student", "--reasoning")),
    "temperature": _extract(
        *("--reasoning", "teacher", "--temperature", "-1"), says=("expected 0 (greedy) or more", "found -1.0")
    ),
    "seed": _extract("--seed", -1, says=("expected 0 or more, and less than 2**32", "found -1", "--seed")),
    "no new tokens": _extract(
        *("--reasoning", "teacher", "--max-new-tokens", 0), says=("expected at least 1, found 0", "--max-new-tokens")
    ),
    "temperature of nothing": _extract(
        "--temperature", "1", says=("temperature: expected it with --reasoning teacher alone", "found 1.0")
    ),
    "other reasoning": _extract("--reasoning", "teacher", place=STORED, says=("reasoning differs", "found dataset")),
    "samples 0": _extract("--samples", 0, says=("expected at least 1", "found 0")),
    "samples negative": _extract("--samples", -1, says=("expected at least 1", "found -1")),
    "eval samples 0": _extract("--eval-samples", 0, says=("expected at least 1", "found 0")),
    "no dataset": _extract("--dataset", "no.jsonl", says=("expected a .jsonl file", "no.jsonl")),
    "empty dataset": _extract("--dataset", "empty.jsonl", says=("empty.jsonl: expected at least 3", "found 0")),
    "line 3 is bad": _extract("--dataset", "bad.jsonl", says=("bad.jsonl, line 3: expected a JSON object", "found")),
    "line 2 has no fields": _extract("--dataset", "odd.jsonl", says=("odd.jsonl, line 2: expected the fields", "cat")),
    "bytes": _extract("--dataset", "bytes.jsonl", says=("bytes.jsonl: expected UTF-8 text, found byte 0xff",)),
    "unknown dataset": _extract(
        "--dataset", "nosuch", says=("'nosuch': expected word-problems, word-problems-long, a .jsonl path",)
    ),
    "below a file": _extract("--store", "file/new.zarr", says=("expected folders", "found the file", "--store")),
    "a file": _extract("--store", "file", says=("file is taken: expected a free place", "found a file", "--store")),
    "no store there": _extract(
        "--store", "folder", says=("folder is taken: expected a free place", "found a folder that is no store")
    ),
    "other samples": _extract("--samples", 23, place=STORED, says=("num_samples differs", "expected 31, found 32")),
    "other seed": _extract("--seed", 1, place=STORED, says=("stored.zarr holds another extraction", "--store")),
    "other dataset": _extract("--dataset", "good.jsonl", place=STORED, says=("name differs", "found word-problems")),
    "other teacher": _extract(model="other", place=STORED, says=("name differs", "expected other, found teacher")),
    "other weights": _extract(model="twin/teacher", place=STORED, says=("teacher.weights_hash differs",)),
    "other dtype": _extract("--dtype", "float32", place=STORED, says=("dtype differs", "expected float32")),
    "other codec": _extract("--codec", "int8", place=STORED, says=("codec differs", "expected int8, found raw")),
    "other layers": _extract("--layers", "0", place=STORED, says=("layers differs", "expected [0], found")),
    "other segments": _extract("--segments", "answer", place=STORED, says=("segments differs", "expected ['answer']")),
    "other eviction": _extract(
        "--evict", "rkv", "--budget", "8", place=STORED, says=("eviction differs", "expected rkv, found none")
    ),
    "policy": _extract("--evict", "h2o", "--budget", "8", says=("evict: expected none, right-crop", "found h2o")),
    "policy alone": _extract("--evict", "rkv", says=("expected both evict and budget", "no budget")),
    "budget alone": _extract("--budget", "0.5", says=("expected both evict and budget", "budget 0.5")),
    "budget of none": _extract("--evict", "rkv", "--budget", "0", says=("budget: expected a share", "found 0")),
    "budget of 1.5": _extract("--evict", "rkv", "--budget", "1.5", says=("no such budget", "found 1.5")),
    "budget of all": _extract("--evict", "rkv", "--budget", "1.0", says=("expected a share below 1", "found 1.0")),
    "budget of nothing": _extract("--evict", "rkv", "--budget", "nan", says=("no such budget", "found nan")),
    "budget a word": _extract("--evict", "rkv", "--budget", "half", says=("no such budget", "found half")),
    "budget beyond": _extract("--evict", "rkv", "--budget", "9999", says=("larger than every sample", "found 9999")),
    "segment": _extract("--segments", "prompt,proof", says=("expected all, or some of prompt", "found 'prompt,proof'")),
    "no segment": _extract("--segments", "", says=("found ''", "--segments")),
    "revision of what is here": _extract("--revision", "main", says=("'teacher' has no revisions", "found main")),
    "where one stands": _extract("--store", ".", says=(". is taken: expected a free place",)),
    "other limit": _extract("--max-tokens", 64, place=STORED, says=("max_tokens differs", "expected 64, found 1024")),
}
DISTILL_CASES = {
    "mode": _distill("--mode", "nosuch", says=("mode", "expected structured or flat or flat-global or", "nosuch")),
    "direction": _distill("--direction", "up", says=("direction", "expected student-to-teacher or", "up")),
    "on collapse": _distill("--on-collapse", "cry", says=("collapse", "expected stop or warn", "cry")),
    "device": _distill("--device", "quantum", says=("expected auto, cpu, cuda", "found quantum", "--device")),
    "batch size 0": _distill("--batch-size", 0, says=("expected more than 0, found 0", "--batch-size")),
    "samples 0": _distill("--samples", 0, says=("expected at least 1, found 0", "--samples")),
    "too many samples": _distill("--samples", 25, says=("expected at most 24, found 25", "--samples")),
    "max steps 0": _distill("--max-steps", 0, says=("expected at least 1", "found 0", "--max-steps")),
    "learning rate": _distill("--learning-rate", "nan", says=("expected", "found nan", "--learning-rate")),
    "seed": _distill("--seed", -1, says=("expected 0 or more", "found -1", "--seed")),
    "nothing to shuffle": _distill(
        "--mode", "none", "--kv-control", "shuffled", says=("expected none with mode none",)
    ),
    "eval split": _distill("--eval-split", "nosuch", says=("expected train or validation or test, found nosuch",)),
    "unknown student": _distill("--student", "nosuch", says=("cannot load the student 'nosuch'", "--student")),
    "student's weights": _distill("--student", "cut", says=("cannot load the student 'cut'", "Mend --student")),
    "other tokens": _distill(
        "--student", "other", "--time-map", "identity", says=("student and teacher read different tokens", "--time-map")
    ),
    "no folder for it": _distill("--output-dir", "file/run", says=("file/run",)),
    "a model's folder": _distill("--output-dir", "teacher", says=("teacher is not a run directory", "expected")),
    "no store": _distill("--store", "no.zarr", says=("no KV store at no.zarr", "expected", "found nothing")),
    "half a store": _distill("--store", "half.zarr", says=("half.zarr is incomplete", "expected 6 shards, found 5")),
    "half its metadata": _distill("--store", "torn.zarr", says=("torn.zarr is not a KV store, or its metadata",)),
    "lost its tokens": _distill("--store", "lost.zarr", says=("input_ids in", "is damaged", "expected", "found")),
    "which store": Case(["distill"], ("expected exactly one under stores/, found none", "--store")),
    "bench which store": Case(["bench"], ("expected exactly one under stores/, found none", "after the command")),
    "plan for no model": Case(["plan", "--model", "nosuch"], ("model 'nosuch'", "kvpipe models")),
    "plan for no codec": Case(["plan", "--model", "teacher", "--codec", "zip"], ("codec: expected raw", "found zip")),
    "bench nothing": Case(["bench", "no.zarr"], ("no KV store at no.zarr", "found nothing")),
    "bench half": Case(["bench", "half.zarr"], ("half.zarr is incomplete", "expected 6 shards, found 5")),
    "bench batch": Case(["bench", "stored.zarr", "--batch-size", 0], ("expected at least 1, found 0", "--batch-size")),
    "inspect nothing": Case(["inspect", "no.zarr"], ("no KV store at no.zarr", "found nothing")),
    "inspect a folder": Case(["inspect", "folder"], ("found a folder without zarr.json",)),
    "no experiment": Case(["experiment", "run", "no.toml"], ("no experiment file at no.toml", "expected a .toml file")),
    "jobs 0": Case(["experiment", "run", "sound.toml", "--jobs", 0], ("expected at least 1, found 0", "--jobs")),
    "experiment arm": Case(
        ["experiment", "run", "arm.toml"], ("arm.toml, line 16: comparisons.0.arm: expected flat or none", "nosuch")
    ),
    "experiment mode": Case(["experiment", "run", "mode.toml"], ("mode.toml, line 14: arms.none.mode", "nosuch")),
    "experiment samples": Case(["experiment", "run", "samples.toml"], ("line 8: extract.samples", "found 'many'")),
    "experiment seeds": Case(["experiment", "run", "seeds.toml"], ("seeds.toml, line 5: seeds", "found [1, 1]")),
    "experiment field": Case(["experiment", "run", "field.toml"], ("line 14: arms.none.modus", "found modus")),
    "experiment key": Case(["experiment", "run", "missing.toml"], ("missing.toml", "secondary_metric")),
    "experiment syntax": Case(["experiment", "run", "syntax.toml"], ("syntax.toml is not TOML", "expected TOML")),
}
OTHER_CASES = {
    "debug first": Case(["--debug", "distill", "--mode", "nosuch"], ("ConfigError", "nosuch")),
    "debug last": Case(["inspect", "no.zarr", "--debug"], ("StoreError", "no KV store at no.zarr")),
    "not a number": Case(["distill", "--batch-size", "many"], ("--batch-size", "valid integer")),
    "unknown option": Case(["extract", "--model", "teacher", "--nosuch"], ("--nosuch",)),
    "no model": Case(["extract"], ("--model",)),
    "unknown command": Case(["nosuch"], ("'nosuch'",)),
}
if not torch.cuda.is_available():
    absent = ("the GPU asked for is not there", "expected cuda, found 0 CUDA devices", "--device cpu")
    EXTRACT_CASES["no GPU"] = _extract("--device", "cuda", says=absent)
    DISTILL_CASES["no GPU"] = _distill("--device", "cuda", says=absent)


@pytest.fixture(scope="session")
def workplace(teacher: Path, other_teacher: Path, store: Path) -> Callable[[Path], set[str]]:
    """`workplace(folder)` lays out what the cases need, and says which entries there are."""

    def lay_out(folder: Path) -> set[str]:
        (folder / "teacher").symlink_to(teacher)
        (folder / "other").symlink_to(other_teacher)
        (folder / "stored.zarr").symlink_to(store)
        (folder / "folder" / "of others").mkdir(parents=True)
        (folder / "file").write_text("not a folder")
        _break_teachers(folder, teacher, other_teacher)
        _break_stores(folder, store)
        lines = '{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n'
        (folder / "good.jsonl").write_text(lines)
        (folder / "empty.jsonl").write_text("")
        (folder / "bad.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nthree\n')
        (folder / "odd.jsonl").write_text('{"text": "one"}\n{"cat": "two"}\n{"text": "three"}\n')
        (folder / "bytes.jsonl").write_bytes(lines.encode() + b'{"text": "\xff"}\n')
        (folder / "sound.toml").write_text(EXPERIMENT.format(**SOUND))
        for name, text in EXPERIMENTS.items():
            (folder / f"{name}.toml").write_text(text)
        return _entries(folder)

    return lay_out


def _break_teachers(folder: Path, teacher: Path, other_teacher: Path) -> None:
    for name in ("cut", "garbled", "speechless", "twin/teacher"):
        shutil.copytree(teacher, folder / name)
    weights = (teacher / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").unlink()
    (folder / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "garbled" / "config.json").write_text("{")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "speechless" / file).unlink()
    shutil.copy(other_teacher / "model.safetensors", folder / "twin" / "teacher")


def _break_stores(folder: Path, store: Path) -> None:
    for name in ("half", "torn", "lost"):
        shutil.copytree(store, folder / f"{name}.zarr")
    (folder / "half.zarr" / "ledger" / "c" / "1" / "0").unlink()
    (folder / "torn.zarr" / "zarr.json").write_text((store / "zarr.json").read_text()[:-100])
    shutil.rmtree(folder / "lost.zarr" / "input_ids" / "c")


def _entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def outcomes(kvpipe: Any, workplace: Any, built_once: Any) -> Callable[[str], dict[str, Any]]:
    """`outcomes("extract")`: every case's outcome, all run in one folder, and what they left there."""

    def get(stage: str) -> dict[str, Any]:
        cases = {"extract": EXTRACT_CASES, "distill": DISTILL_CASES | OTHER_CASES}[stage]

        def build(folder: Path) -> None:
            (folder / "work").mkdir()
            before = workplace(folder / "work")
            found = kvpipe.many([case.argv for case in cases.values()], cwd=folder / "work")
            after = _entries(folder / "work")
            report = {
                "outcomes": {name: vars(outcome) for name, outcome in zip(cases, found, strict=True)},
                "left": sorted(after ^ before),
            }
            (folder / "report.json").write_text(json.dumps(report))

        return json.loads((built_once(f"bad-{stage}", build) / "report.json").read_text())

    return get


@pytest.mark.parametrize("name", EXTRACT_CASES)
def test_extract_refuses(outcomes: Any, name: str) -> None:
    _check_refused(outcomes("extract")["outcomes"][name], EXTRACT_CASES[name])


@pytest.mark.parametrize("name", DISTILL_CASES)
def test_the_other_commands_refuse(outcomes: Any, name: str) -> None:
    _check_refused(outcomes("distill")["outcomes"][name], DISTILL_CASES[name])


@pytest.mark.parametrize("stage", ["extract", "distill"])
def test_refusals_leave_nothing_behind(outcomes: Any, stage: str) -> None:
    assert outcomes(stage)["left"] == []


def _check_refused(outcome: dict[str, Any], case: Case) -> None:
    stderr = outcome["stderr"]
    assert outcome["code"] == 2, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("Error: ")
    for word in case.words:
        assert word in line
    assert outcome["stdout"] == ""


@pytest.mark.parametrize("name", [name for name in OTHER_CASES if name.startswith("debug")])
def test_debug_shows_the_traceback(outcomes: Any, name: str) -> None:
    outcome = outcomes("distill")["outcomes"][name]
    assert outcome["code"] != 0
    assert "Traceback (most recent call last)" in outcome["stderr"]
    for word in OTHER_CASES[name].words:
        assert word in outcome["stderr"].splitlines()[-1]


@pytest.mark.parametrize("name", [name for name in OTHER_CASES if not name.startswith("debug")])
def test_an_option_that_cannot_be_parsed_is_named(outcomes: Any, name: str) -> None:
    """Here the parser of the command line speaks, in a box with the usage."""
    outcome = outcomes("distill")["outcomes"][name]
    assert outcome["code"] == 2
    assert "Usage: kvpipe" in outcome["stderr"]
    assert "Traceback" not in outcome["stderr"]
    for word in OTHER_CASES[name].words:
        assert word in outcome["stderr"]


# ---------------------------------------------------------------------- the disk

SMALL = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = os.getuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if not made or made.returncode != 0:
        pytest.skip("a small file system cannot be mounted here: that takes root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_without_space_is_refused_before_anything_is_written(
    kvpipe: Any, teacher: Path, small_disk: Path, tmp_path: Path
) -> None:
    (outcome,) = kvpipe.many([["extract", "--model", teacher, *NEW, "--store", small_disk / "new.zarr"]], cwd=tmp_path)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert line.startswith(f"Error: not enough space for {small_disk / 'new.zarr'}: expected ")
    assert "MB, found 1.0 MB free. Free some" in line
    assert list(small_disk.iterdir()) == []


def test_a_write_that_fails_leaves_whole_files_only(kvpipe: Any, teacher: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for a disk that fills up on the way."""

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL // 4, SMALL // 4))

    command = ["extract", "--model", teacher, *NEW]
    (outcome,) = kvpipe.many([command], cwd=tmp_path, before=limit_file_size)
    assert outcome.code == 2
    (line,) = [line for line in outcome.error_lines if line.startswith("Error: ")]
    assert line == outcome.error_lines[-1]
    assert "File too large" in line
    assert "Traceback" not in outcome.stderr
    assert list(tmp_path.rglob("*.partial")) == []
    for array in ("kv", "ledger"):
        assert [path.name for path in (tmp_path / "new.zarr" / array).rglob("*") if path.is_file()] == ["zarr.json"]
