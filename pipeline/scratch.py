"""Folders for what is measured and thrown away, on the disk that it is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from ..kvcache.files import remove_tree
from ..kvcache.lock import is_held, lock_path, only_writer

PREFIX = ".kvpipe-scratch-"


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """An empty folder, which is removed at the end, like those that killed processes left there."""
    for left in beside.glob(f"{PREFIX}*"):
        if not is_held(left):
            remove_tree(left)
            lock_path(left).unlink(missing_ok=True)
    folder = beside / f"{PREFIX}{uuid4().hex}"
    with only_writer(folder):
        try:
            folder.mkdir()
            yield folder
        finally:
            remove_tree(folder)
