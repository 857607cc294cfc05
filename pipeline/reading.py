"""Files of a run directory are data, and may be anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..kvcache.errors import ConfigError


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Whatever a damaged file makes a library raise, raised as ConfigError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{path} is damaged",
            expected="what kvpipe wrote",
            found=error if type(error) is ValueError else f"{type(error).__name__}: {error}",
            remedy=remedy,
        ) from error
