"""One writer at a time; the dead hold nothing; what cannot be known is not taken."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.lock import SECONDS_TO_SIGN, is_held, lock_path, only_writer

HOLD = "import sys, time; from pathlib import Path; from kvpipe.kvcache.lock import only_writer\n"
HOLD += "with only_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def hold_elsewhere(path: Path) -> subprocess.Popen[str]:
    """Another process that has the lock by the time this returns."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_told_who_the_first_is_and_the_dead_hold_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    process = hold_elsewhere(path)
    refused = (
        rf"another process writes .*x.zarr: .*found process {process.pid} on {socket.gethostname()}, since \d{{4}}-"
    )
    with pytest.raises(StoreError, match=refused), only_writer(path):
        pytest.fail("two writers")
    process.kill()
    process.communicate()
    assert lock_path(path).exists()
    with only_writer(path):
        assert str(os.getpid()) in lock_path(path).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_another_host_is_never_taken_for_dead(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    lock_path(path).write_text("1\nsome-other-host\n")
    with pytest.raises(StoreError, match=r"process 1 on some-other-host.*delete .*\.x\.zarr\.lock"), only_writer(path):
        pytest.fail("two writers")
    assert lock_path(path).exists()


def test_a_marker_that_was_never_signed_is_taken_over_once_it_is_old(tmp_path: Path) -> None:
    """A process that was killed between creating and signing it."""
    path, marker = tmp_path / "x.zarr", lock_path(tmp_path / "x.zarr")
    marker.touch()
    assert is_held(path)
    with pytest.raises(StoreError, match="only just begun"), only_writer(path):
        pytest.fail("two writers")
    old = marker.stat().st_mtime - SECONDS_TO_SIGN - 1
    os.utime(marker, (old, old))
    assert not is_held(path)
    with only_writer(path):
        assert marker.stat().st_size > 0
        assert is_held(path)
    assert not is_held(path)


def test_folders_made_for_the_marker_go_with_it_and_others_stay(tmp_path: Path) -> None:
    with only_writer(tmp_path / "a" / "b" / "x.zarr"):
        pass
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "a" / "b" / "x.zarr"):
        (tmp_path / "a" / "other").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "other"]


def test_it_is_given_back_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "x.zarr"):
        print(1 / 0)  # noqa: T201
    assert list(tmp_path.iterdir()) == []


def test_all_paths_to_one_place_have_one_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "x.zarr"
    store.mkdir()
    (tmp_path / "link").symlink_to("x.zarr")
    monkeypatch.chdir(store)
    marker = tmp_path / ".x.zarr.lock"
    assert {lock_path(Path(path)) for path in (".", "", "../x.zarr", "../link", store)} == {marker}
    with only_writer(tmp_path / "link"), pytest.raises(StoreError, match="another process writes"), only_writer(store):
        pytest.fail("two writers")


def test_there_is_nothing_beside_the_root() -> None:
    with pytest.raises(StoreError, match="not a place to write"), only_writer(Path("/")):
        pytest.fail("a writer of everything")
