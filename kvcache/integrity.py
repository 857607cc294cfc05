"""Checksums of all that a store holds besides the KV, whose chunks the ledger guards: no flipped bit, no file of
another array, no edited attribute goes unseen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import hash_json
from .shard import crc32c

METADATA = "zarr.json"
_SEAL = "seal"


def metadata_checksums(store: Path) -> dict[str, int]:
    """crc32c of every array's and inner group's metadata file, by its path in the store."""
    files = sorted(path for path in store.rglob(METADATA) if path.parent != store)
    return {path.relative_to(store).as_posix(): _checksum(path) for path in files}


def require_metadata(store: Path, checksums: Mapping[str, int]) -> None:
    """Raise ValueError for a metadata file that is not what `metadata_checksums` saw, OSError for a missing one."""
    for name in filter(is_metadata, checksums):
        if _checksum(store / name) != checksums[name]:
            raise ValueError(f"{name} fails its checksum")


def seal(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes with a hash of themselves."""
    content = {name: value for name, value in attributes.items() if name != _SEAL}
    return {**content, _SEAL: hash_json(content)}


def require_seal(attributes: Mapping[str, Any]) -> None:
    """Raise ValueError for attributes that are not as `seal` left them."""
    if seal(attributes) != attributes:
        raise ValueError("the attributes fail their checksum")


def is_metadata(name: str) -> bool:
    """Whether a path in a store is that of a metadata file."""
    return name.rsplit("/", 1)[-1] == METADATA


def _checksum(path: Path) -> int:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    return crc32c(np.frombuffer(path.read_bytes(), np.uint8))
