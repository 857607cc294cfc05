"""Checksums of all but the KV, whose chunks the ledger guards: no flipped bit, no file of another array, no edited
attribute goes unseen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .files import flush as flush_file
from .manifest import hash_json
from .shard import crc32c

PIECE_BYTES = 2**22
_SEAL = "seal"

FileChecksums = Mapping[str, Mapping[str, int]]
"""Bytes and crc32c of files, by their path in a folder."""


def metadata_checksums(store: Path) -> FileChecksums:
    """Of the metadata of every array and inner group in a store."""
    return file_checksums(store, (path for path in store.rglob("zarr.json") if path.parent != store))


def file_checksums(folder: Path, files: Iterable[Path], *, flush: bool = False) -> FileChecksums:
    """Of `files`, which are in `folder`; with `flush` they are on the disk before anything says so."""
    files = sorted(files)
    for path in files if flush else ():
        flush_file(path)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32c": _checksum(path)} for path in files
    }


def require_files(folder: Path, checksums: FileChecksums) -> None:
    """Raise ValueError for a file that is missing, or not what `file_checksums` saw."""
    for name, wanted in checksums.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        # First: the file may be as large as it likes.
        if path.stat().st_size != wanted["bytes"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}")
        if _checksum(path) != wanted["crc32c"]:
            raise ValueError(f"{name} fails its checksum")


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a hash of itself."""
    content = {name: value for name, value in document.items() if name != _SEAL}
    return {**content, _SEAL: hash_json(content)}


def require_seal(document: Mapping[str, Any]) -> None:
    """Raise ValueError for an object that is not as `seal` left it."""
    if seal(document) != document:
        raise ValueError("its seal is broken")


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            checksum = crc32c(np.frombuffer(piece, np.uint8), checksum)
    return checksum
