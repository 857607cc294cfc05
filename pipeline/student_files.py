"""What a student on disk is: its files, not the path that leads to them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..kvcache.integrity import FileChecksums, file_checksums


def student_files(student: str) -> FileChecksums:
    """Checksums of a student's file, or of those in its folder; none of a built-in student or a Hub id, which are what
    they are called."""
    path = Path(student)
    folder, files = (path.parent, [path]) if path.is_file() else (path, sorted(path.glob("[!.]*")))
    stats = tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
    return _checksums(folder, stats)


@lru_cache(maxsize=4)
def _checksums(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> FileChecksums:
    """By size and time, for an experiment asks once a run."""
    return file_checksums(folder, [file for file, *_ in files])
