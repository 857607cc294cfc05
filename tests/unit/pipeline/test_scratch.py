"""A folder to measure in is gone at the end, whatever the end is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kvpipe.kvcache.lock import lock_path
from kvpipe.pipeline.scratch import PREFIX, scratch_folder

HOLDER = """
import sys
from pathlib import Path
from kvpipe.pipeline.scratch import scratch_folder

with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "shard").write_bytes(b"kv")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_nothing_stays_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), scratch_folder(tmp_path) as folder:
        folder.mkdir()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        theirs = Path(holder.stdout.readline().strip())
        with scratch_folder(tmp_path) as ours:
            assert ours != theirs
        assert [path.name for path in theirs.iterdir()] == ["shard"]
        os.kill(holder.pid, signal.SIGKILL)
    assert theirs.exists()
    # Another, that was killed before it had made its folder.
    orphan = lock_path(tmp_path / f"{PREFIX}0")
    orphan.write_text(lock_path(theirs).read_text())
    with scratch_folder(tmp_path):
        assert not theirs.exists()
    assert list(tmp_path.iterdir()) == []
