"""Files that are either whole or not there."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"

REMOVAL_TRIES = 50


class PartialFile:
    """A file under a temporary name, written piece by piece: `commit` puts it in place, `discard` leaves nothing.

    Its OSErrors name the file that was wanted, which a full disk does not say of itself.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = partial_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb", buffering=0)

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data`, one byte an item, at an offset."""
        view = memoryview(data)
        with naming(self._path):
            while len(view):
                done = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[done:], offset + done

    def commit(self) -> None:
        """Flush to the disk, then rename into place."""
        with naming(self._path):
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._path)
            # On POSIX the directory entry has to be flushed as well.
            flush(self._path.parent)

    def discard(self) -> None:
        """Close and remove what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make the system's errors name what was to be written, where they name nothing, as of a full disk, or what is
    there in the meantime."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or PARTIAL in str(error.filename)):
            error.filename, error.filename2 = str(path), None
        raise


def partial_path(path: Path) -> Path:
    """The temporary name of a file."""
    return path.with_name(f"{path.name}{PARTIAL}")


def remove_tree(folder: Path) -> None:
    """Remove a folder that Zarr may still be writing into, in threads of its own, after an interruption."""
    for _ in range(REMOVAL_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.02)


def flush(path: Path) -> None:
    """Make a file that somebody else wrote, or the entries of a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `data` under a temporary name, flush it to the disk, then rename it into place."""
    file = PartialFile(path)
    try:
        file.write_at(data, 0)
        file.commit()
    except BaseException:
        file.discard()
        raise
