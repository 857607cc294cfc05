"""Which errors are the user's to mend, and what they are told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from kvpipe.cli import app
from typer.testing import CliRunner


def raised(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever the library raises
        call()
    return caught.value


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 60, np.uint8)])
def test_memory_that_is_not_there_is_one_line(allocate: Callable[[], Any]) -> None:
    error = raised(allocate)
    assert app._user_error_code(error) == 2
    assert app._sentence(error).startswith("Out of memory (")
    assert app._sentence(error).endswith("Lower --batch-size, or free some")


def test_a_bug_stays_a_traceback() -> None:
    assert app._user_error_code(raised(lambda: [][0])) is None
    assert app._user_error_code(RuntimeError("shape mismatch")) is None


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (IsADirectoryError(21, "Is a directory", "x"), "Remove what is in the way, or choose another place"),
        (RuntimeError("I/O error: Is a directory (os error 21)"), "Remove what is in the way, or choose another place"),
        (PermissionError(13, "Permission denied", "x"), "Mend the permissions, or choose another place"),
        (OSError(28, "No space left on device", "x"), "Make room or choose another place"),
    ],
)
def test_every_kind_of_disk_error_has_its_own_remedy(error: Exception, remedy: str) -> None:
    assert app._user_error_code(error) == 2
    assert app._sentence(error).endswith(f". {remedy}")


@pytest.mark.parametrize(
    ("command", "resumes"),
    [
        (["extract", "--model", "qwen"], True),
        (["distill"], True),
        (["repair", "x.zarr"], True),
        (["experiment", "run", "ab.toml"], True),
        (["experiment", "status", "ab.toml"], False),
        (["bench", "x.zarr"], False),
        (["verify", "extract.zarr"], False),
        ([], False),
    ],
)
def test_only_what_goes_on_where_it_stopped_says_so(
    command: list[str], resumes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kvpipe", *command])
    with pytest.raises(KeyboardInterrupt):
        app._interrupt()
    with pytest.raises(SystemExit, match="143"):
        app._stop()
    said = [*capsys.readouterr().err.splitlines(), app._sentence(OSError(28, "No space left on device", "x"))]
    assert len(said) == 3
    assert ["goes on where it stopped" in line for line in said] == [resumes] * 3


def test_the_version_is_told() -> None:
    result = CliRunner().invoke(app.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"kvpipe {version('kvpipe')}\n"


IN_A_DESTRUCTOR = """
import os, signal, sys, time
from kvpipe.cli import app

class Short:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.01)

signal.signal(signal.SIGINT, app._interrupt)
signal.signal(signal.SIGTERM, app._stop)
sys.unraisablehook = app._signal_again
try:
    Short()
    time.sleep(20)
except (KeyboardInterrupt, SystemExit):
    print("stopped")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_within_a_destructor_is_not_forgotten(name: str) -> None:
    """Python prints what a destructor raises, and goes on."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_DESTRUCTOR.format(name=name)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "stopped\n"
    assert "Traceback" not in done.stderr
