"""A process that reads what a stranger made: every request in a child of its own, with little memory and time.

Run as a script, this file is that process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvpipe.kvcache.errors import KVPipeError
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.summary import summarise
from kvpipe.kvcache.verify import require_side_arrays, verify_shards
from kvpipe.pipeline.models import tokenizer_from_files
from kvpipe.pipeline.training_data import KVDataset

TOKEN = "hf_notARealTokenButNobodyMayStoreIt"

MEMORY = 2**31
"""Bytes that reading a store may map beyond what the libraries take."""

RESIDENT = 300_000_000
"""Bytes that it may use."""

SECONDS = 10
"""A command that takes longer hangs: the sound store takes less than one."""


def reading_steps(path: str) -> dict[str, str]:
    """All that commands read of a store, step by step: `ok`, `refused: ...`, or the error that should not be."""
    outcomes: dict[str, str] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        try:
            result = work()
        except KVPipeError as error:
            outcomes[name] = f"refused: {error}"
            return None
        except BaseException as error:  # noqa: BLE001 - every other error is what the test looks for
            outcomes[name] = f"{type(error).__name__}: {str(error)[:300]}"
            return None
        outcomes[name] = "ok"
        return result

    store = step("open", lambda: KVStore.open(path))
    if store is None:
        return outcomes
    step("side arrays", lambda: require_side_arrays(store))
    step("verify", lambda: [str(damage) for damage in verify_shards(store) if damage])
    step("summary", lambda: summarise(store))
    step("tokenizer", lambda: tokenizer_from_files(store.tokenizer_files()))
    step("records", lambda: [(record["id"], record["prompt"]) for record in store.records])
    reader = step("complete", lambda: KVReader(store))
    if reader is not None:
        for split in store.split_names:
            step(f"split {split[:10]}", lambda split=split: store.indices(split))
        for sample in range(min(store.num_samples, 8)):
            step(f"KV of {sample}", lambda i=sample: reader.read([i]))
        step("batch", lambda: KVDataset(store, with_kv=True).__getitems__(range(min(store.num_samples, 8))))
    return outcomes


def run_command(argv: list[str], output: int) -> None:
    """The command line, to its end; never returns."""
    from kvpipe.cli.app import main

    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv, code = ["kvpipe", *argv], 0
    try:
        main()
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    except BaseException as error:  # noqa: BLE001 - a traceback is what the test looks for
        os.write(output, f"Traceback: {type(error).__name__}: {error}".encode())
        code = 1
    sys.stdout.flush()
    os._exit(code)


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Do one request in a process of its own, with bounds on its memory and time."""
    pages, resident = (
        int(count) * resource.getpagesize() for count in Path("/proc/self/statm").read_text().split()[:2]
    )
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, pages + MEMORY))
            if "argv" in request:
                os.chdir(request["cwd"])
                run_command(request["argv"], output.fileno())
            os.write(output.fileno(), json.dumps(reading_steps(request["store"])).encode())
            os._exit(0)
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() - start > request["seconds"]:
                os.kill(pid, 9)
            time.sleep(0.005)
        output.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "resident": usage.ru_maxrss * 1024 - resident,
            "output": output.read().decode(errors="replace"),
        }


class Reader:
    """The server, and what its answers must be like."""

    def __init__(self) -> None:
        # One arena: what threads reserve for themselves is no allocation.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "HF_TOKEN": TOKEN}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"seconds": SECONDS, **request}) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def read(self, store: Path) -> dict[str, str]:
        """What came of every step; none may hang, crash or swell."""
        answer = self.ask(store=str(store))
        assert answer["code"] == 0, f"reading ended with {answer['code']} (-9: it took more than {SECONDS} s)"
        assert answer["resident"] < RESIDENT, f"reading took {answer['resident'] / 1e6:.0f} MB"
        steps: dict[str, str] = json.loads(answer["output"])
        return steps

    def command(self, *argv: object, cwd: Path, seconds: int = 60) -> dict[str, Any]:
        return self.ask(argv=[str(word) for word in argv], cwd=str(cwd), seconds=seconds)

    def stop(self) -> None:
        self._server.communicate()


def is_one_line(answer: dict[str, Any]) -> bool:
    """Exit code 0, or 2 with one line that says why."""
    lines = [line for line in answer["output"].splitlines() if line.startswith("Error:")]
    return answer["code"] == 0 or (answer["code"] == 2 and len(lines) == 1 and "Out of memory" not in lines[0])


class Marking:
    """Its pickle, once loaded, leaves a file where the process stands and in the temporary folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


if __name__ == "__main__":
    import kvpipe.cli.app
    import kvpipe.pipeline.distill
    import kvpipe.pipeline.repair  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)
