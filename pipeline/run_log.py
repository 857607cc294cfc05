"""What the process of a run wrote, and whether it says that the run failed."""

from __future__ import annotations

from pathlib import Path

_FAILED = "Error: "
"""Begins the last line of the log of a run that failed."""


def log_path(run_dir: Path) -> Path:
    """Beside the run's folder: what its process wrote."""
    return run_dir.with_name(f"{run_dir.name}.log")


def failed(error: str) -> str:
    """What a run that fails says last, on one line: it is what `failure` finds."""
    return f"{_FAILED}{' '.join(error.split())}"


def failure(run_dir: Path) -> str:
    """The error that ended a run, from the last line of its log; empty where it was interrupted, or goes on."""
    try:
        lines = log_path(run_dir).read_text(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return ""
    return lines[-1].removeprefix(_FAILED) if lines and lines[-1].startswith(_FAILED) else ""
