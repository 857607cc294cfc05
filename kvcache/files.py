"""Files that are either whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `data` under a temporary name, flush it to the disk, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        # A full disk does not say which file it was.
        error.filename = error.filename or str(path)
        raise
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Make a rename durable: on POSIX the directory entry has to be flushed as well."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
