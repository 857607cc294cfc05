"""One writer at a time, whoever comes and whoever dies; an experiment that ends leaves nobody at work."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvpipe.kvcache.lock import SECONDS_TO_SIGN, lock_path
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.verify import verify_shards

from .conftest import EXTRACT, Commands, Tally, contents

DISTILL = ["distill", "--mode", "flat", "--batch-size", "4", "--epochs", "12", "--save-steps", "5"]
DISTILL += ["--max-new-tokens", "4", "--store", "../x.zarr", "--output-dir", "run"]
SECONDS_TO_END = 300
"""A bound for tests that would otherwise hang, and no promise: other work on the machine may hold anything up."""


def start(argv: list[str], cwd: Path) -> subprocess.Popen[str]:
    """A command in a process of its own, left running."""
    return subprocess.Popen(
        [sys.executable, "-m", "kvpipe.cli.app", *argv],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(reached: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + SECONDS_TO_END
    while not reached():
        assert process is None or process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def require_refusal(answer: dict[str, Any], holder: int, path: str) -> None:
    """One line that names process, host and time of the holder."""
    assert answer["code"] == 2, answer["output"]
    lines = answer["output"].strip().splitlines()
    assert len(lines) == 1, answer["output"]
    assert f"Error: another process writes {path}: expected no other writer, found process {holder} " in lines[0]
    assert f" on {socket.gethostname()}, since {time.strftime('%Y-')}" in lines[0]


def require_store(folder: Path, expected: dict[str, bytes]) -> None:
    assert contents(folder, {"x.zarr/zarr.json"}) == expected
    store = KVStore.open(folder / "x.zarr")
    assert store.complete
    assert not any(verify_shards(store))


@pytest.fixture(scope="module")
def whole(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an extraction and a distillation went undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "a").mkdir()
    commands.finish(EXTRACT, folder)
    commands.finish(DISTILL, folder / "a")
    return folder


# ---------------------------------------------------------------------- extract and distill


def test_a_second_extraction_is_refused_and_takes_over_from_a_dead_first(
    commands: Commands, whole: Path, tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    """The first is stopped at its work, so that it holds the store; then it goes on, or is killed, in turn."""
    expected = contents(whole, {"x.zarr/zarr.json", "a/*", "a/*/*", "a/*/*/*", "a/*/*/*/*"})
    rng, injected = np.random.default_rng(20), 0
    for number in range(points(1, 10)):
        folder = tmp_path / str(number)
        folder.mkdir()
        first, marker = start(EXTRACT, folder), lock_path(folder / "x.zarr")
        wait_for(lambda marker=marker: marker.exists() and marker.stat().st_size > 0, first)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.4))
        first.send_signal(signal.SIGSTOP)
        held = marker.exists()
        second = commands.run(EXTRACT, folder)
        if held:
            injected += 1
            require_refusal(second, first.pid, "x.zarr")
        if number % 2:
            first.send_signal(signal.SIGCONT)
            _, stderr = first.communicate(timeout=SECONDS_TO_END)
            assert first.returncode == 0, stderr
        else:
            first.kill()
            first.communicate()
            assert marker.exists() == held
            commands.finish(EXTRACT, folder)
        require_store(folder, expected)
    tally.add("two writers, extract", tried=number + 1, injected=injected, detected=injected, lost=0)


def test_a_second_distillation_is_refused_and_takes_over_from_a_dead_first(
    commands: Commands, whole: Path, tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    left_out = {"run.json", "metrics.jsonl", "checkpoints/*/*"}
    expected = contents(whole / "a" / "run", left_out)
    (tmp_path / "x.zarr").symlink_to(whole / "x.zarr")
    rng, injected = np.random.default_rng(21), 0
    for number in range(points(1, 8)):
        folder = tmp_path / str(number)
        folder.mkdir()
        first, marker = start(DISTILL, folder), lock_path(folder / "run")
        wait_for(lambda marker=marker: marker.exists() and marker.stat().st_size > 0, first)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 2) if number else 0)
        first.send_signal(signal.SIGSTOP)
        held = marker.exists()
        second = commands.run(DISTILL, folder)
        if held:
            injected += 1
            require_refusal(second, first.pid, "run")
        if number % 2:
            first.send_signal(signal.SIGCONT)
            _, stderr = first.communicate(timeout=SECONDS_TO_END)
            assert first.returncode == 0, stderr
        else:
            first.kill()
            first.communicate()
            commands.finish(DISTILL, folder)
        assert contents(folder / "run", left_out) == expected
        records = [json.loads((place / "run" / "run.json").read_text()) for place in (folder, whole / "a")]
        assert records[0]["metrics"] == records[1]["metrics"]
    tally.add("two writers, distill", tried=number + 1, injected=injected, detected=injected, lost=0)


# ---------------------------------------------------------------------- races

RACE = """
import os, random, sys, time
from multiprocessing import get_context
from pathlib import Path
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.lock import only_writer

path, notes, seed, attempts, hold = Path(sys.argv[1]), Path(sys.argv[2]), *map(float, sys.argv[3:])
log = os.open(notes / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
inside = notes / "inside"
fork = get_context("fork")
barrier = fork.Barrier(8)
CALLS = {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir"}

def note(what):
    os.write(log, f"{what} {os.getpid()}\\n".encode())

def compete(number):
    rng = random.Random(f"{seed} {number}")

    def be_slow(event, arguments):
        if event in CALLS and arguments and ".x.zarr" in str(arguments[0]):
            time.sleep(rng.choice([0, 0, 0.01 * rng.random()]))

    sys.addaudithook(be_slow)
    barrier.wait()
    for _ in range(int(attempts)):
        try:
            with only_writer(path):
                note("in")
                inside.write_text(str(os.getpid()))
                time.sleep(hold * rng.random())
                if inside.read_text() != str(os.getpid()):
                    note("not alone:")
                note("out")
            return
        except StoreError:
            note("refused")
        except BaseException as error:
            note(f"failed with {error!r}:")
            return

processes = [fork.Process(target=compete, args=(number,)) for number in range(8)]
for process in processes:
    process.start()
for process in processes:
    process.join()
"""
SIGNED_BY_THE_DEAD = """
import os, signal, sys
from pathlib import Path
from kvpipe.kvcache.lock import only_writer
with only_writer(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def competitors(path: Path, seed: int, attempts: int, hold: float) -> subprocess.Popen[bytes]:
    """Eight processes that want to write at `path` at once, and note in `path`'s grandparent what became of them.

    Now and then the system lets one wait at a call, as a busy machine does.
    """
    notes = path.parents[1]
    (notes / "log").unlink(missing_ok=True)
    return subprocess.Popen([sys.executable, "-c", RACE, *map(str, (path, notes, seed, attempts, hold))])


def race(path: Path, seed: int) -> list[str]:
    """What became of eight who started at once, in order."""
    assert competitors(path, seed, attempts=3, hold=0.02).wait(timeout=SECONDS_TO_END) == 0
    return (path.parents[1] / "log").read_text().splitlines()


def require_one_at_a_time(lines: list[str]) -> None:
    """Whoever came in went out before the next came in."""
    assert not [line for line in lines if line.startswith(("not alone", "failed"))], lines
    passages = [line.split() for line in lines if not line.startswith("refused")]
    assert [word for word, _ in passages] == ["in", "out"] * (len(passages) // 2), lines
    assert all(passages[i][1] == passages[i + 1][1] for i in range(0, len(passages), 2)), lines
    assert passages, "nobody came in"


def leave_dead_marker(path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", SIGNED_BY_THE_DEAD, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert lock_path(path).stat().st_size > 0


def leave_unsigned_marker(path: Path) -> None:
    """What a process leaves that was killed between creating its marker and signing it, some time later."""
    lock_path(path).touch()
    old = time.time() - SECONDS_TO_SIGN - 1
    os.utime(lock_path(path), (old, old))


def leave_nothing(path: Path) -> None:
    assert not lock_path(path).exists()


@pytest.mark.parametrize("leave", [leave_nothing, leave_dead_marker, leave_unsigned_marker])
def test_of_eight_processes_that_start_at_once_one_at_a_time_writes(
    tmp_path: Path, points: Callable[[int, int], int], tally: Tally, leave: Callable[[Path], None]
) -> None:
    rounds = points(5, 50)
    path = tmp_path / "stores" / "x.zarr"
    path.parent.mkdir()
    for number in range(rounds):
        leave(path)
        require_one_at_a_time(race(path, number))
        assert not lock_path(path).exists()
    # Seven of eight are kept out at any moment.
    tally.add("two writers, race", tried=rounds * 8, injected=rounds * 7, detected=rounds * 7, lost=0)


def test_a_folder_that_is_there_for_the_marker_alone_is_no_trap(
    tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    """It goes with the first writer's marker, while others wait for theirs."""
    rounds = points(5, 50)
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
        require_one_at_a_time(race(tmp_path / str(number) / "stores" / "x.zarr", number))
    tally.add("two writers, race", tried=rounds * 8, injected=rounds * 7, detected=rounds * 7, lost=0)


def test_after_the_holder_is_killed_one_of_those_who_wait_gets_it(
    tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    """The holder dies while eight try again and again."""
    hold = "import sys, time; from pathlib import Path; from kvpipe.kvcache.lock import only_writer\n"
    hold += "with only_writer(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)"
    rounds, rng = points(2, 20), np.random.default_rng(22)
    for number in range(rounds):
        path, log = tmp_path / "stores" / "x.zarr", tmp_path / "log"
        path.parent.mkdir(exist_ok=True)
        holder = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "1\n"
        waiting = competitors(path, number, attempts=3, hold=0.05)
        time.sleep(rng.uniform(0.2, 0.8))
        before = log.read_text() if log.exists() else ""
        holder.kill()
        holder.communicate()
        assert waiting.wait(timeout=SECONDS_TO_END) == 0
        assert "in " not in before
        lines = log.read_text().splitlines()
        require_one_at_a_time(lines)
        assert not lock_path(path).exists()
    tally.add("two writers, holder killed", tried=rounds, injected=rounds, detected=rounds, lost=0)


# ---------------------------------------------------------------------- experiments

EXPERIMENT = """
name = "x"
primary_metric = "ce"
greater_is_better = false
seeds = [1, 2]
[extract]
model = "qwen"
samples = 40
eval_samples = 4
max_shard_bytes = 400000
store = "x.zarr"
[budget]
max_steps = {steps}
[base]
batch_size = 8
max_new_tokens = 4
[arms.none]
mode = "none"
[arms.flat]
mode = "flat"
[[comparisons]]
arm = "flat"
control = "none"
"""


def begin(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "x.toml").write_text(EXPERIMENT.format(steps=20))
    return start(["experiment", "run", "x.toml", "--jobs", "2"], folder)


def scores(folder: Path) -> Any:
    """What an experiment found, without what it cost."""
    results = json.loads((folder / "reports" / "x" / "results.json").read_text())
    return results["comparisons"], [(run["name"], run["scores"], run["curve"]) for run in results["runs"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Scores of an experiment that nobody stopped, run once, where they are asked for."""

    @cache
    def get() -> Any:
        folder = tmp_path_factory.mktemp("experiment") / "whole"
        process = begin(folder)
        _, stderr = process.communicate(timeout=SECONDS_TO_END)
        assert process.returncode == 0, stderr
        return scores(folder)

    return get


def children(pids: set[int]) -> set[int]:
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return {child for child, parent in parents.items() if parent in pids}


def living(pids: set[int]) -> set[int]:
    """Those still at work: a dead process that nobody has asked about yet is not."""
    alive = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            alive.add(pid)
    return alive


@pytest.mark.parametrize(
    ("name", "sent", "code"),
    [
        ("experiment killed", [signal.SIGKILL], -signal.SIGKILL),
        ("SIGTERM, experiment", [signal.SIGTERM], 143),
        ("SIGINT, experiment", [signal.SIGINT], 130),
        ("SIGINT twice, experiment", [signal.SIGINT, signal.SIGINT], 130),
    ],
)
def test_an_experiment_that_is_stopped_leaves_no_run_behind_and_starts_again_at_once(
    tmp_path: Path,
    points: Callable[[int, int], int],
    tally: Tally,
    undisturbed: Callable[[], Any],
    name: str,
    sent: list[signal.Signals],
    code: int,
) -> None:
    """The signal goes to the process that leads, not to its runs. With SIGKILL each run sees for itself."""
    tried = points(0, 3)
    if tried == 0:
        pytest.skip("takes long: make test-faults (test_kill.py kills an experiment in every run)")
    expected = undisturbed() if points(0, 1) else None
    rng, injected = np.random.default_rng([23, len(sent), sent[0]]), 0
    for number in range(tried):
        folder = tmp_path / str(number)
        process = begin(folder)
        wait_for(lambda folder=folder: any(folder.glob("runs/x/*.log")), process)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 3))
        # The runs are forked by a server, which is a child of the process that leads.
        servers = children({process.pid})
        runs = children(servers)
        finished = len(list(folder.glob("runs/x/*/run.json")))
        for wait, number_of_signal in zip((0, rng.uniform(0, 0.3)), sent, strict=False):
            time.sleep(wait)
            process.send_signal(number_of_signal)
        _, stderr = process.communicate(timeout=SECONDS_TO_END)
        left = living(runs)
        if process.returncode != 0:
            injected += 1
            # One that comes while Python itself ends kills as it would any process; a shell shows 130 for both.
            assert process.returncode == code or ("twice" in name and process.returncode == -signal.SIGINT), stderr
            assert "Traceback" not in stderr
            assert servers
            if code != -signal.SIGKILL:
                assert not left, "runs outlived an experiment that ended in order"
        again = begin(folder)
        _, stderr = again.communicate(timeout=SECONDS_TO_END)
        assert not living(servers | runs)
        assert again.returncode == 0, f"{finished} runs were done, {stderr}"
        assert len(list(folder.glob("runs/x/*/run.json"))) == 4
        assert list(folder.rglob("*.lock")) == []
        if expected is not None:
            assert scores(folder) == expected
    assert injected > 0
    tally.add(name, tried=tried, injected=injected, detected=injected, lost=0)
