"""Run `kvpipe` commands in forked processes that meet with a fault: the imports are paid once.

Reads one JSON request a line, `{"argv", "cwd"}` and perhaps a fault, and answers `{"code", "events", "output"}`:

- `kill_at_event`: the process kills itself at that call of all that change the file system, a write being torn;
- `signals`: `[[seconds, signal], ...]`, each sent so long after the one before;
- `limits`: `{"RLIMIT_NOFILE": 10}` and the like.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

HELD = {signal.SIGINT, signal.SIGTERM}
"""Not delivered before the command begins, nor once it has ended."""

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.utime"}
WRITE_MODES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MODULES = ("cli.app", "pipeline.extract", "pipeline.distill", "pipeline.repair")


class Killer:
    """Counts the events of this process, and ends it at the one asked for."""

    def __init__(self, kill_at: int | None) -> None:
        self.events = 0
        self._kill_at = kill_at
        self._lock = threading.Lock()
        sys.addaudithook(self._audit)
        os.fsync = self._counted(os.fsync)
        self._pwrite, os.pwrite = os.pwrite, self._torn_write

    def _due(self) -> bool:
        with self._lock:
            self.events += 1
            return self.events == self._kill_at

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        opened_to_write = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & WRITE_MODES)
        if (opened_to_write or event in CHANGES) and self._due():
            os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self._due():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    def _torn_write(self, descriptor: int, data: Any, offset: int) -> int:
        if self._due():
            self._pwrite(descriptor, memoryview(data)[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return self._pwrite(descriptor, data, offset)


def run_child(request: dict[str, Any], output: int, result: int) -> None:
    """Never returns: the process ends as the `kvpipe` script would, or at its fault."""
    from kvpipe.cli.app import main

    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["cwd"])
    for name, limit in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.argv = ["kvpipe", *request["argv"]]
    killer, code = Killer(request.get("kill_at_event")), 0
    # A signal that comes before the command has its own handlers ends the process, without a word of this file.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        main()
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    sys.stdout.flush()
    os.write(result, json.dumps(killer.events).encode())
    os._exit(code)


def serve(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output:
        read, write = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        pid = os.fork()
        if pid == 0:
            run_child(request, output.fileno(), write)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        os.close(write)
        for seconds, number in request.get("signals", []):
            time.sleep(seconds)
            os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(read, "rb") as result:
            events = json.loads(result.read() or b"null")
        output.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "events": events,
            "output": output.read().decode(errors="replace"),
        }


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in MODULES:
        importlib.import_module(f"kvpipe.{module}")
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)
