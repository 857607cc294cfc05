"""Run several `kvpipe` commands in one process: the imports are paid once, argv and exit codes stay real.

Reads a JSON list of argument lists from standard input and writes one `{code, stdout, stderr, seconds}` for each.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from kvpipe.cli.app import main


def run(argv: list[str]) -> dict[str, Any]:
    """What the interpreter would make of one call of the `kvpipe` script."""
    sys.argv = ["kvpipe", *argv]
    code: Any = 0
    start = time.perf_counter()
    with _captured(1) as stdout, _captured(2) as stderr:
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        except BaseException:  # noqa: BLE001 - as the interpreter would
            traceback.print_exc()
            code = 1
    seconds = time.perf_counter() - start
    return {"code": code or 0, "stdout": stdout.getvalue(), "stderr": stderr.getvalue(), "seconds": seconds}


@contextmanager
def _captured(descriptor: int) -> Iterator[io.StringIO]:
    """All that goes to a file descriptor, from native code too."""
    text = io.StringIO()
    saved = os.dup(descriptor)
    with tempfile.TemporaryFile() as file:
        _flush()
        os.dup2(file.fileno(), descriptor)
        try:
            yield text
        finally:
            _flush()
            os.dup2(saved, descriptor)
            os.close(saved)
            file.seek(0)
            text.write(_decoded(file))


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _decoded(file: IO[bytes]) -> str:
    return file.read().decode(errors="replace")


if __name__ == "__main__":
    commands = json.load(sys.stdin)
    json.dump([run(argv) for argv in commands], sys.stdout)
