"""One writer at a time: a marker file that says who it is."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import SoftFileLock, Timeout

from .errors import StoreError

FOLDER_TRIES = 100

SECONDS_TO_SIGN = 5
"""A marker that is still empty after this long was left by a process that died between creating and signing it."""


def lock_path(path: Path) -> Path:
    """The marker beside a store or a run directory, hidden: one, whatever path leads there. Raises StoreError where
    there is no beside."""
    place = path.resolve()
    if not place.name:
        raise StoreError("not a place to write", expected="a folder of its own", found=path, remedy="Choose another")
    return place.with_name(f".{place.name}.lock")


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Be the one process that writes at `path`, as long as the context lasts.

    The marker's existence is the lock, so it holds on network file systems whose flock does not. One whose process
    died on this host is taken over. Raises StoreError naming host, process and time for a living one, and for
    one on another host, of whose processes nothing can be known.
    """
    marker = lock_path(path)
    with _folder_for(marker):
        _acquire(lock := SoftFileLock(marker, timeout=0.5), path)
        try:
            yield
        finally:
            lock.release()


def is_held(path: Path) -> bool:
    """Whether some process writes at `path` now, as far as can be known: one of another host's is taken at its word."""
    marker = lock_path(path)
    try:
        pid, host = _signature(marker)
    except PermissionError:
        return True
    except ValueError:
        return not _is_abandoned(marker)
    except OSError:
        return False
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    return True


def _acquire(lock: SoftFileLock, path: Path) -> None:
    marker = lock_path(path)
    try:
        _retry_without_folder(lock, marker)
    except Timeout as error:
        raise StoreError(
            f"another process writes {path}",
            expected="no other writer",
            found=_holder(marker),
            remedy=f"Wait until it is done; if it is gone for certain, delete {marker}",
        ) from error


def _retry_without_folder(lock: SoftFileLock, marker: Path) -> None:
    """Another process may take away the folder that it had made for its own marker, at any moment."""
    for _ in range(FOLDER_TRIES):
        # A folder may be there for mkdir to find, and gone before mkdir has looked at it.
        with suppress(FileNotFoundError, FileExistsError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            _remove_unsigned(marker)
            lock.acquire()
            return
    lock.acquire()


@contextmanager
def _folder_for(marker: Path) -> Iterator[None]:
    """Folders that are on the way to the marker for its sake alone go with it."""
    made = [parent for parent in marker.parents if not parent.exists()]
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _remove_unsigned(marker: Path) -> None:
    if not _is_abandoned(marker):
        return
    # One at a time: between a look and the removal, nobody else may remove it and sign one of their own.
    with SoftFileLock(marker.with_name(f"{marker.name}.unsigned")):
        if _is_abandoned(marker):
            marker.unlink()


def _is_abandoned(marker: Path) -> bool:
    try:
        found = marker.stat()
    except FileNotFoundError:
        return False
    return found.st_size == 0 and time.time() - found.st_mtime > SECONDS_TO_SIGN


def _signature(marker: Path) -> tuple[str, str]:
    """Process and host, as filelock writes them. Raises OSError or ValueError where nobody has signed."""
    pid, host, *_ = marker.read_text(errors="replace").splitlines()
    return pid, host


def _holder(marker: Path) -> str:
    try:
        pid, host = _signature(marker)
        since = datetime.fromtimestamp(marker.stat().st_mtime).astimezone()
    except (OSError, ValueError):
        return "one that has only just begun"
    return f"process {pid} on {host}, since {since:%Y-%m-%d %H:%M:%S %Z}"
