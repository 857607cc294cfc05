"""Two processes of one job write one store: the same, to the last byte, as one process writes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kvpipe.kvcache.errors import ConfigError
from kvpipe.kvcache.lock import only_writer
from kvpipe.pipeline.ranks import require_one_process

EXTRACT = ["extract", "--model", "qwen", "--samples", "300", "--eval-samples", "4", "--batch-size", "4"]
EXTRACT += ["--max-shard-size", "200KB", "--store", "x.zarr"]
LAUNCHER = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def start(cwd: Path, *launcher: str, **environment: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", *launcher, "kvpipe.cli.app", *EXTRACT]
    given = {**os.environ, **environment}
    return subprocess.Popen(argv, cwd=cwd, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, errors = process.communicate(timeout=200)
    return process.returncode, output + errors


def contents(store: Path) -> dict[str, bytes]:
    """All but the root's metadata, which says what the extraction cost."""
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and path != store / "zarr.json"]
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    code, said = finish(start(folder))
    assert code == 0, said
    return folder / "x.zarr"


def test_two_ranks_write_what_one_process_writes(by_one: Path, tmp_path: Path) -> None:
    code, said = finish(start(tmp_path, *LAUNCHER))
    assert code == 0, said
    assert contents(tmp_path / "x.zarr") == contents(by_one)
    assert [path.name for path in tmp_path.iterdir()] == ["x.zarr"]
    (line,) = [line for line in said.splitlines() if line.startswith("x.zarr: 308 samples")]
    assert " of " not in line, "the tokens of both ranks are all there are"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_after_a_rank_was_killed_one_process_goes_on(by_one: Path, tmp_path: Path) -> None:
    process = start(tmp_path, *LAUNCHER)
    store, deadline = tmp_path / "x.zarr", time.monotonic() + 120
    while sum(1 for _ in store.glob("ledger/c/*/0")) < 6:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(_children(process.pid)[-1], signal.SIGKILL)
    code, said = finish(process)
    assert code != 0
    assert "Traceback" not in said.split("torch/distributed")[0]
    code, said = finish(start(tmp_path))
    assert code == 0, said
    assert contents(store) == contents(by_one)


def test_a_job_is_refused_as_a_whole_where_another_process_writes(tmp_path: Path) -> None:
    with only_writer(tmp_path / "x.zarr"):
        code, said = finish(start(tmp_path, *LAUNCHER))
    assert code != 0
    assert f"Error: another process writes x.zarr: expected no other writer, found process {os.getpid()}" in said
    assert not (tmp_path / "x.zarr").exists()


def test_ranks_without_a_folder_in_common_are_refused(tmp_path: Path) -> None:
    """Each would write a store of its own, with holes where the other's shards are."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    processes = [start(folder, **job, RANK=str(rank)) for rank, folder in enumerate(folders)]
    (_, of_main), (code, said) = (finish(process) for process in processes)
    assert code == 2, said
    assert "Error: x.zarr is not there for all processes of this job: expected a folder that they share" in said
    assert processes[0].returncode == 2, of_main
    assert "another process of this job has failed" in of_main
    assert list(folders[1].iterdir()) == []


def test_commands_that_do_not_share_their_work_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    require_one_process("distill")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"`kvpipe distill` runs in one process: expected a world size of 1, found 2"):
        require_one_process("distill")
