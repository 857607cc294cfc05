"""`kvpipe`: one command a stage. Errors a user can mend take one line; `--debug` shows the traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from contextlib import suppress
from importlib import metadata

import typer

from .bench import bench
from .distill import distill
from .experiment import experiment
from .extract import extract
from .inspect import inspect
from .models import models
from .plan import plan
from .profile import profile
from .repair import repair
from .report import report
from .verify import verify

app = typer.Typer(
    name="kvpipe",
    help="Offline KV-cache distillation: run the teacher once, distil many students from its stored KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
for command in (plan, extract, profile, distill, inspect, verify, repair, bench, models):
    app.command()(command)
app.add_typer(experiment, name="experiment")
app.add_typer(report, name="report")


_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_IN_THE_WAY = "Remove what is in the way, or choose another place"
_REMEDIES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST), _IN_THE_WAY),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Mend the permissions, or choose another place"),
}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvpipe {metadata.version('kvpipe')}")
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error. Works after any command."),
    version: bool = typer.Option(False, "--version", help="Show the version.", is_eager=True, callback=_show_version),
) -> None:
    pass


def main() -> None:
    """Run the command line: the README lists its exit codes."""
    try:
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _signal_again
        _run()
    except KeyboardInterrupt:
        # A second Ctrl-C, while the first was being dealt with.
        sys.exit(128 + signal.SIGINT)
    finally:
        # All is unwound: one more Ctrl-C could only disturb the interpreter's own end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run() -> None:
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    _quiet_libraries()
    try:
        app()
    except Exception as error:
        code = _user_error_code(error)
        if debug or code is None:
            raise
        message = " ".join(_sentence(error).split())
        typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
        sys.exit(code)


def _stop(*_: object) -> None:
    """Unwind as after Ctrl-C, so that nothing half-written stays; batch systems send SIGTERM before they kill."""
    _say(f"Stopped by SIGTERM.{_what_now()}")
    sys.exit(128 + signal.SIGTERM)


def _interrupt(*_: object) -> None:
    _say(f"Interrupted.{_what_now()}")
    raise KeyboardInterrupt


def _say(sentence: str) -> None:
    # Ctrl-C in a pipeline takes those who would read it as well.
    with suppress(OSError):
        typer.secho(sentence, err=True)


def _what_now() -> str:
    return " The same command goes on where it stopped." if _resumes() else ""


def _resumes() -> bool:
    """Whether the command is one of those that go on where they stopped."""
    return " ".join(sys.argv[1:3]).startswith(("extract", "distill", "repair", "experiment run"))


def _signal_again(lost: sys.UnraisableHookArgs) -> None:
    """A signal that strikes within a destructor would be printed and forgotten: send it once more, from a thread, for
    this is still the destructor's time."""
    again = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
    if again is None:
        sys.__unraisablehook__(lost)
    else:
        threading.Timer(0.01, os.kill, (os.getpid(), again)).start()


def _user_error_code(error: Exception) -> int | None:
    """The exit code of an error that the user can mend, or None for a bug of ours."""
    from ..data.errors import DataError
    from ..kvcache.errors import KVPipeError

    if isinstance(error, KVPipeError):
        return error.exit_code
    mendable = isinstance(error, DataError | OSError | MemoryError) or _is_os_error(error) or _is_out_of_memory(error)
    return 2 if mendable else None


def _is_os_error(error: Exception) -> bool:
    """An OSError, or what libraries written in Rust make of one."""
    return isinstance(error, OSError) or _RUST_ERROR.search(str(error)) is not None


def _is_out_of_memory(error: Exception) -> bool:
    """torch's own error for a GPU, and the plain one it raises for the CPU."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        reason = str(error).split(". ")[0] or "no more to be had"
        return f"Out of memory ({reason}). Lower --batch-size, or free some"
    if not _is_os_error(error):
        return str(error)
    found = f"{error.strerror} at {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
    remedy = _REMEDIES.get(_errno(error) or 0, "Make room or choose another place")
    return f"{found}. {remedy}{'; the same command then goes on where it stopped' if _resumes() else ''}"


def _errno(error: Exception) -> int | None:
    """The system's number of an error, which libraries written in Rust put into its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = _RUST_ERROR.search(str(error))
    return int(match[1]) if match else None


def _quiet_libraries() -> None:
    """Our own progress bars and errors say what the libraries' would say twice."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
