"""One writer at a time: a marker file that says who it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import SoftFileLock, Timeout

from .errors import StoreError

SECONDS_TO_SIGN = 5
"""A marker that is still empty after this long was left by a process that died between creating and signing it."""


def lock_path(path: Path) -> Path:
    """The marker beside a store or a run directory, hidden."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Be the one process that writes at `path`, as long as the context lasts.

    The marker's existence is the lock, so it holds on network file systems whose flock does not. One whose process
    died on this host is taken over. Raises StoreError naming host, process and time for a living one, and for
    one on another host, of whose processes nothing can be known.
    """
    marker = lock_path(path)
    with _folder_for(marker):
        _remove_unsigned(marker)
        _acquire(lock := SoftFileLock(marker, timeout=0.5), path)
        try:
            yield
        finally:
            lock.release()


def _acquire(lock: SoftFileLock, path: Path) -> None:
    marker = lock_path(path)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreError(
            f"another process writes {path}",
            expected="no other writer",
            found=_holder(marker),
            remedy=f"Wait until it is done; if it is gone for certain, delete {marker}",
        ) from error


@contextmanager
def _folder_for(marker: Path) -> Iterator[None]:
    """The folders on the way to the marker; those made for it alone go with it."""
    made = [parent for parent in marker.parents if not parent.exists()]
    marker.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _remove_unsigned(marker: Path) -> None:
    try:
        found = marker.stat()
    except FileNotFoundError:
        return
    if found.st_size == 0 and time.time() - found.st_mtime > SECONDS_TO_SIGN:
        marker.unlink(missing_ok=True)


def _holder(marker: Path) -> str:
    try:
        pid, host, *_ = marker.read_text(errors="replace").splitlines()
        since = datetime.fromtimestamp(marker.stat().st_mtime).astimezone()
    except (OSError, ValueError):
        return "one that has only just begun"
    return f"process {pid} on {host}, since {since:%Y-%m-%d %H:%M:%S %Z}"
