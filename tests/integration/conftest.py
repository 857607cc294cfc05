"""The real command line in processes of its own, on a random teacher. What is slow is built once for all workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from kvpipe.data.word_problems import generate
from kvpipe.pipeline.teacher_recipes import new_model, train_tokenizer

KVPIPE = Path(sysconfig.get_path("scripts")) / "kvpipe"
MANY_COMMANDS = Path(__file__).with_name("many_commands.py")
TIMEOUT = 240

EXTRACT = ["--samples", "24", "--eval-samples", "4", "--batch-size", "8", "--max-shard-size", "1MB"]
DISTILL = ["--batch-size", "4", "--epochs", "5", "--max-new-tokens", "8"]
ARMS = {
    "structured": ["--mode", "structured"],
    "flat": ["--mode", "flat"],
    "none": ["--mode", "none"],
    "flat-shuffled": ["--mode", "flat", "--kv-control", "shuffled"],
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float = 0.0

    @property
    def error_lines(self) -> list[str]:
        return self.stderr.strip().splitlines()


class CommandLine:
    """`kvpipe` as a user runs it."""

    def __call__(self, *argv: object, cwd: Path, code: int = 0) -> Outcome:
        """Run one command in a process of its own; it must end with `code`."""
        process = self.start(*argv, cwd=cwd)
        stdout, stderr = process.communicate(timeout=TIMEOUT)
        assert process.returncode == code, f"exit code {process.returncode}\n{stdout}\n{stderr}"
        return Outcome(process.returncode, stdout, stderr)

    def start(self, *argv: object, cwd: Path) -> subprocess.Popen[str]:
        """Start one command and leave it running."""
        return subprocess.Popen(
            [str(KVPIPE), *map(str, argv)],
            cwd=cwd,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def many(
        self, commands: Sequence[Sequence[object]], cwd: Path, before: Callable[[], None] | None = None
    ) -> list[Outcome]:
        """Run commands one after the other in one process, for what needs no process of its own."""
        process = subprocess.run(
            [sys.executable, str(MANY_COMMANDS)],
            cwd=cwd,
            text=True,
            input=json.dumps([[str(word) for word in argv] for argv in commands]),
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
            preexec_fn=before,
        )
        assert process.returncode == 0, process.stderr
        return [Outcome(**outcome) for outcome in json.loads(process.stdout)]


@pytest.fixture(scope="session")
def kvpipe() -> CommandLine:
    return CommandLine()


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`built_once(name, build)`: a folder that the first worker to need it fills, and all share. Not to be changed."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def get(name: str, build: Callable[[Path], None]) -> Path:
        folder, done = base / "shared" / name, base / "shared" / f"{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return get


def _make_teacher(folder: Path, seed: int) -> None:
    tokenizer = train_tokenizer(list(generate("train", 400, seed)))
    torch.manual_seed(seed)
    new_model(tokenizer).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def teacher(built_once: Any) -> Path:
    """A random teacher of the built-in architecture, with a tokenizer trained on the word problems."""
    return built_once("teachers", lambda folder: _make_teacher(folder / "teacher", seed=0)) / "teacher"


@pytest.fixture(scope="session")
def other_teacher(built_once: Any) -> Path:
    """Another one: other weights and another tokenizer."""
    return built_once("other-teachers", lambda folder: _make_teacher(folder / "other", seed=1)) / "other"


@pytest.fixture(scope="session")
def store(built_once: Any, kvpipe: CommandLine, teacher: Path) -> Path:
    """A complete store, whose teacher is deleted as soon as it is written."""

    def build(folder: Path) -> None:
        shutil.copytree(teacher, folder / "teacher")
        outcome = kvpipe("extract", "--model", "teacher", *EXTRACT, cwd=folder)
        assert "32 samples" in outcome.stdout
        shutil.rmtree(folder / "teacher")

    return built_once("extraction", build) / "stores" / "teacher.zarr"


@pytest.fixture(scope="session")
def run_of(built_once: Any, kvpipe: CommandLine, store: Path) -> Callable[[str], Path]:
    """`run_of(arm)`: a finished run directory of one of ARMS."""

    def get(arm: str) -> Path:
        def build(folder: Path) -> None:
            options = [*ARMS[arm], *DISTILL, "--store", store, "--output-dir", folder / "run"]
            outcome = kvpipe("distill", *options, cwd=folder)
            assert "teacher forwards: 0" in outcome.stdout

        return built_once(f"run-{arm}", build) / "run"

    return get


# For modules whose `workplace` is a folder with runs under `runs`, and in `report.json` how commands ended, by name.


@pytest.fixture(scope="module")
def outcome_of(workplace: Path) -> Callable[[str], dict[str, Any]]:
    report = json.loads((workplace / "report.json").read_text())
    return lambda name: report[name]


@pytest.fixture(scope="module")
def record_of(workplace: Path, outcome_of: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """`record_of(name)`: the run.json of a run that must have ended well."""

    def get(name: str) -> dict[str, Any]:
        assert outcome_of(name)["code"] == 0, outcome_of(name)["stderr"]
        return dict(json.loads((workplace / "runs" / name / "run.json").read_text()))

    return get


@pytest.fixture(scope="module")
def require_refused(workplace: Path, outcome_of: Callable[[str], dict[str, Any]]) -> Callable[..., None]:
    """`require_refused(name, words)`: it ended with exit code 2 and one line that has these words, and left no run."""

    def require(name: str, words: Sequence[str]) -> None:
        outcome = outcome_of(name)
        assert outcome["code"] == 2, outcome["stderr"]
        (line,) = outcome["stderr"].splitlines()
        assert line.startswith("Error: ")
        for word in words:
            assert word in line
        assert not (workplace / "runs" / name).exists()

    return require


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
