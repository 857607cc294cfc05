"""Experiment trackers: transformers' own integrations."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.integrations import get_available_reporting_integrations

from ..kvcache.errors import ConfigError


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is not installed, or that transformers does not know."""
    installed = get_available_reporting_integrations()
    if missing := [name for name in names if name not in installed]:
        raise ConfigError(
            "no such tracker is installed",
            expected=", ".join(installed) or "one that transformers knows, which has to be installed",
            found=", ".join(missing),
            remedy="Mend --report-to, or install it (pip install tensorboard, wandb, trackio, mlflow, ...)",
        )
