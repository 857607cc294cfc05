"""Folders for what is measured and thrown away, on the disk that it is about."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from ..kvcache.files import remove_tree
from ..kvcache.lock import is_held, lock_path, only_writer

PREFIX = ".kvpipe-scratch-"


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """An empty folder, which is removed at the end, like those that killed processes of this machine left there."""
    for marker in beside.glob(f".{PREFIX}*.lock"):
        _sweep(marker.with_name(marker.stem[1:]))
    folder = beside / f"{PREFIX}{uuid4().hex}"
    with only_writer(folder):
        try:
            folder.mkdir()
            yield folder
        finally:
            remove_tree(folder)


def _sweep(left: Path) -> None:
    """Remove a folder and then its marker, unless somebody works there, or it is somebody else's to remove."""
    if is_held(left):
        return
    shutil.rmtree(left, ignore_errors=True)
    if not left.exists():
        with suppress(OSError):
            lock_path(left).unlink()
