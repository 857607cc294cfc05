"""What surrounds a command fails: it says so on one line, leaves nothing half-written, and can be typed again."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.verify import verify_shards

from .conftest import EXTRACT, Commands, Tally, contents

ATTRIBUTES = {"x.zarr/zarr.json"}
DISTILL = ["distill", "--mode", "flat", "--batch-size", "8", "--epochs", "3", "--save-steps", "2"]
DISTILL += ["--max-new-tokens", "4"]


SECONDS: dict[str, float] = {}
"""How long a command takes when nothing disturbs it."""


@pytest.fixture(scope="module")
def whole(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an extraction and a distillation went undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    commands.finish(["models"], folder)  # the imports do not count
    for command in (EXTRACT, [*DISTILL, "--store", "x.zarr", "--output-dir", "run"]):
        start = time.perf_counter()
        commands.finish(command, folder)
        SECONDS[command[0]] = time.perf_counter() - start
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`disk("size=4m")`: a small file system of its own."""
    mounts: list[Path] = []

    def mount(options: str) -> Path:
        point = tmp_path / f"disk{len(mounts)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("a file system cannot be mounted here: that takes root")
        mounts.append(point)
        return point

    yield mount
    for point in mounts:
        subprocess.run(["umount", "-l", str(point)], check=True)


def require_refusal(answer: dict[str, Any], words: str = "") -> None:
    """Exit code 2, and the last line of the output is the error."""
    assert answer["code"] == 2, answer["output"]
    # At its end the interpreter may complain of what it cannot clean up without file handles.
    assert "Traceback" not in answer["output"].split("Exception ignored in")[0]
    errors = [line for line in answer["output"].splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, answer["output"]
    assert words in errors[0]


def require_sound_leftovers(folder: Path, *, hidden: bool = False) -> None:
    """Nothing half-written, no marker; what the ledger counts is whole. (`hidden`: to clean up took handles.)"""
    assert hidden or list(folder.rglob("*.partial")) == []
    assert list(folder.rglob("*.lock")) == []
    if (folder / "x.zarr").exists():
        store = KVStore.open(folder / "x.zarr")
        damaged = {damage.shard for damage in verify_shards(store) if damage is not None}
        assert damaged == set(range(store.num_shards)) - store.finished_shards()


def require_same_store(folder: Path, whole: Path) -> None:
    kept = {name: data for name, data in contents(whole, ATTRIBUTES).items() if name.startswith("x.zarr/")}
    assert contents(folder, ATTRIBUTES) == kept


def test_files_that_cannot_grow_stop_an_extraction(
    commands: Commands, whole: Path, tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    """A limit on file size strikes metadata, side arrays and shards, as a full disk would."""
    rng, injected = np.random.default_rng(0), 0
    for number in range(points(3, 25)):
        folder = tmp_path / str(number)
        folder.mkdir()
        limit = int(np.exp(rng.uniform(np.log(200), np.log(500_000))))
        answer = commands.run(EXTRACT, folder, limits={"RLIMIT_FSIZE": limit})
        if answer["code"] != 0:
            injected += 1
            require_refusal(answer, os.strerror(errno.EFBIG))
            # What it struck is named, but by tokenizers, which writes in Rust.
            assert f"{os.strerror(errno.EFBIG)} at " in answer["output"] or "(os error" in answer["output"]
            require_sound_leftovers(folder)
        commands.finish(EXTRACT, folder)
        require_same_store(folder, whole)
    tally.add("file size limit, extract", tried=number + 1, injected=injected, detected=injected, lost=0)


def test_a_disk_that_fills_up_stops_a_distillation(
    commands: Commands,
    whole: Path,
    disk: Callable[[str], Path],
    points: Callable[[int, int], int],
    tally: Tally,
) -> None:
    """It strikes in checkpoints, in the student or in the record; with room, the same command goes on."""
    rng, injected = np.random.default_rng(1), 0
    left_out = {"run.json", "metrics.jsonl", "checkpoints/*/*"}
    expected = contents(whole / "run", left_out)
    tried = points(2, 20)
    for _ in range(tried):
        folder = disk(f"size={int(rng.uniform(100_000, 8_000_000))}")
        command = [*DISTILL, "--store", str(whole / "x.zarr"), "--output-dir", str(folder / "run")]
        answer = commands.run(command, folder)
        if answer["code"] != 0:
            injected += 1
            require_refusal(answer, os.strerror(errno.ENOSPC))
            require_sound_leftovers(folder)
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        commands.finish(command, folder)
        assert contents(folder / "run", left_out) == expected
    assert injected > 0
    tally.add("full disk, distill", tried=tried, injected=injected, detected=injected, lost=0)


def test_too_few_file_handles_are_an_error_like_any_other(
    commands: Commands, whole: Path, tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    rng, injected = np.random.default_rng(2), 0
    for number in range(points(3, 20)):
        folder = tmp_path / str(number)
        folder.mkdir()
        answer = commands.run(EXTRACT, folder, limits={"RLIMIT_NOFILE": int(rng.integers(5, 30))})
        if answer["code"] != 0:
            injected += 1
            require_refusal(answer)
            require_sound_leftovers(folder, hidden=True)
        commands.finish(EXTRACT, folder)
        require_same_store(folder, whole)
    assert injected > 0
    tally.add("out of file handles", tried=number + 1, injected=injected, detected=injected, lost=0)


def test_a_read_only_disk_is_named(commands: Commands, whole: Path, disk: Callable[[str], Path], tally: Tally) -> None:
    folder = disk("size=1m,ro")
    commands_here = (EXTRACT, [*DISTILL, "--store", str(whole / "x.zarr"), "--output-dir", "run"])
    for command in commands_here:
        require_refusal(commands.run(command, folder), os.strerror(errno.EROFS))
    tally.add("read-only disk", tried=2, injected=2, detected=2, lost=0)


def test_a_folder_without_permission_is_named(whole: Path, tmp_path: Path, tally: Tally) -> None:
    """As root, without root's right to write anywhere."""
    unprivileged = ["setpriv", "--bounding-set", "-dac_override"] if os.getuid() == 0 else []
    if unprivileged and shutil.which("setpriv") is None:
        pytest.skip("root's rights cannot be dropped here: that takes setpriv")
    tmp_path.chmod(0o555)
    for command in (EXTRACT, [*DISTILL, "--store", str(whole / "x.zarr"), "--output-dir", "run"]):
        argv = [*unprivileged, sys.executable, "-m", "kvpipe.cli.app", *command]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
        require_refusal({"code": done.returncode, "output": done.stderr}, os.strerror(errno.EACCES))
    assert list(tmp_path.iterdir()) == []
    tally.add("no permission", tried=2, injected=2, detected=2, lost=0)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGINT twice", 130)])
def test_a_signal_ends_an_extraction_in_order(
    commands: Commands,
    whole: Path,
    tmp_path: Path,
    points: Callable[[int, int], int],
    tally: Tally,
    name: str,
    code: int,
) -> None:
    sent = signal.SIGTERM if name == "SIGTERM" else signal.SIGINT
    rng, injected = np.random.default_rng(3), 0
    for number in range(points(2, 20)):
        folder = tmp_path / str(number)
        folder.mkdir()
        signals = [
            [rng.uniform(0, SECONDS["extract"]), sent],
            *([[rng.uniform(0, 0.1), sent]] if "twice" in name else []),
        ]
        answer = commands.run(EXTRACT, folder, signals=signals)
        if answer["code"] != 0:
            injected += 1
            # Before the command is at work, the signal ends the process as it would any other.
            assert answer["code"] in (code, -sent), answer["output"]
            assert "Traceback" not in answer["output"]
            if "twice" not in name:
                require_sound_leftovers(folder)
        commands.finish(EXTRACT, folder)
        require_same_store(folder, whole)
    tally.add(f"{name}, extract", tried=number + 1, injected=injected, detected=injected, lost=0)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_distillation_in_order(
    commands: Commands,
    whole: Path,
    tmp_path: Path,
    points: Callable[[int, int], int],
    tally: Tally,
    name: str,
    code: int,
) -> None:
    sent = getattr(signal, name)
    rng, injected = np.random.default_rng(4), 0
    left_out = {"run.json", "metrics.jsonl", "checkpoints/*/*"}
    for number in range(points(1, 15)):
        command = [*DISTILL, "--store", str(whole / "x.zarr"), "--output-dir", f"run{number}"]
        answer = commands.run(command, tmp_path, signals=[[rng.uniform(0, SECONDS["distill"]), sent]])
        if answer["code"] != 0:
            injected += 1
            # Before the command is at work, the signal ends the process as it would any other.
            assert answer["code"] in (code, -sent), answer["output"]
            assert "Traceback" not in answer["output"]
            require_sound_leftovers(tmp_path)
        commands.finish(command, tmp_path)
        assert contents(tmp_path / f"run{number}", left_out) == contents(whole / "run", left_out)
    tally.add(f"{name}, distill", tried=number + 1, injected=injected, detected=injected, lost=0)
