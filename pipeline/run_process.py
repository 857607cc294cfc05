"""One run in a process of its own, with its share of the cores and its output in a log."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from ..data.errors import DataError
from ..kvcache.errors import KVPipeError
from .config import DistillConfig
from .distill import distill
from .run_log import failed, failure, log_path


class RunProcess:
    """A started `distill`, which keeps to some `cores`, by number, with a thread for each. `poll` tells when it is
    over, `last_word` of one that failed why."""

    def __init__(
        self,
        config: DistillConfig,
        stores: Sequence[Path],
        run_dir: Path,
        *,
        device: str,
        cores: list[int],
        report_to: Sequence[str] = (),
    ) -> None:
        self.cores = cores
        self._run_dir = run_dir
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        arguments = (config, stores, run_dir, device, cores, report_to)
        self._process: BaseProcess = _context().Process(target=_run, args=arguments, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.exitcode

    def stop(self) -> None:
        """End it now; it can be resumed from its last checkpoint."""
        self._process.terminate()
        self._process.join()

    def last_word(self) -> str:
        """The error that ended it. For one that was killed its log says so from now on, as nobody else can."""
        if not failure(self._run_dir):
            with log_path(self._run_dir).open("a") as log:
                log.write(f"\n{failed(f'exit code {self.poll()} without a word')}\n")
        return failure(self._run_dir)


@cache
def _context() -> ForkServerContext:
    """Runs are forked from a server that has the imports done and has started nothing else: no threads, no GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _run(
    config: DistillConfig,
    stores: Sequence[Path],
    run_dir: Path,
    device: str,
    cores: list[int],
    report_to: Sequence[str],
) -> None:
    with log_path(run_dir).open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    # Ctrl-C reaches every process of a terminal: it is the experiment that stops its runs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(AttributeError, OSError):  # not every system pins, nor lets us
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    try:
        distill(config, stores, run_dir, device=device, report_to=report_to)
    except (KVPipeError, DataError, OSError) as error:
        sys.exit(failed(str(error)))
    except Exception as error:  # noqa: BLE001 - a bug of ours: the log has its traceback, the report its name
        traceback.print_exc()
        sys.exit(failed(f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """A killed experiment stops no run: each sees for itself that nobody waits for it any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
