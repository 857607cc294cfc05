"""Errors that a user can mend. The command line prints them on one line and exits with `exit_code`."""

from __future__ import annotations


class KVPipeError(Exception):
    """What went wrong, what was expected and found, and what to do about it, in one line."""

    exit_code = 2

    def __init__(self, problem: str, *, expected: object = None, found: object = None, remedy: str) -> None:
        message = problem
        if expected is not None or found is not None:
            message += f": expected {expected}, found {'nothing' if found == '' else found}"
        super().__init__(f"{message}. {remedy}")


class StoreError(KVPipeError):
    """A store that is missing, incomplete, damaged, or of another extraction."""


class ModelError(KVPipeError):
    """A model that cannot be loaded, or whose KV cache cannot be captured."""


class ConfigError(KVPipeError):
    """An option or a configuration file that makes no sense."""


class DivergenceError(KVPipeError):
    """A training run whose loss is no number any more."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"the training diverged at step {step}",
            expected="a finite loss",
            found="NaN or infinity",
            remedy="Lower --learning-rate, or what the KV loss weighs (--kv-weight, --kv-loss)",
        )


class CollapseError(KVPipeError):
    """The distillation target lost its variance: the loss falls while nothing is taught."""

    exit_code = 3
