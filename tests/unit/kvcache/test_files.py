"""A file is whole or not there, and a failure leaves nothing behind."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from kvpipe.kvcache.files import PartialFile, naming, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("data", [b"", b"abc", memoryview(b"abc")], ids=["empty", "bytes", "memoryview"])
def test_the_bytes_arrive_in_new_folders(tmp_path: Path, data: bytes | memoryview) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, data)
    assert path.read_bytes() == bytes(data)
    assert names(path.parent) == ["file"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", b"a much longer first version")
    write_atomic(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"second"
    assert names(tmp_path) == ["file"]


def test_a_stale_partial_file_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_bytes(b"left by a killed process")
    write_atomic(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert names(tmp_path) == ["file"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", b"old")
    not_contiguous = memoryview(bytes(8))[::2]  # the write itself fails
    with pytest.raises(BufferError):
        write_atomic(tmp_path / "file", not_contiguous)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_failed_rename_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        write_atomic(tmp_path / "taken", b"data")
    assert names(tmp_path) == ["taken"]


def test_pieces_may_come_in_any_order(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "file")
    file.write_at(b"def", 3)
    file.write_at(b"abc", 0)
    assert names(tmp_path) == ["file.partial"]
    file.commit()
    assert (tmp_path / "file").read_bytes() == b"abcdef"
    assert names(tmp_path) == ["file"]


def test_a_discarded_file_leaves_nothing(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "file")
    file.write_at(b"abc", 0)
    file.discard()
    assert names(tmp_path) == []


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """/dev/full takes no byte, as a full disk does."""
    (tmp_path / "file.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as failure:
        write_atomic(tmp_path / "file", b"abc")
    assert failure.value.filename == str(tmp_path / "file")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "x.zarr"),
        (OSError(errno.EACCES, "Permission denied", ".x.zarr.partial/kv"), "x.zarr"),
        (OSError(errno.ENOENT, "No such file", "/lib/libfoo.so"), "/lib/libfoo.so"),
        (OSError("the tokenizer cannot be saved"), None),
    ],
)
def test_errors_name_what_was_to_be_written_unless_they_know_better(error: OSError, named: str | None) -> None:
    with pytest.raises(type(error)) as failure, naming(Path("x.zarr")):
        raise error
    assert failure.value is error
    assert error.filename == named
