"""What an experiment asked before its first run was finished, kept beside its runs: questions come before answers."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..kvcache.files import write_atomic
from .experiment_config import ExperimentConfig
from .reading import reading

MACHINE: dict[str, Any] = {"device": "auto", "batch_size": None}
"""Options of an extraction that say how, not what."""


def declaration(config: ExperimentConfig) -> dict[str, Any]:
    """What an experiment file says of its recipes, of how their runs are compared and of what they read, as JSON has
    it."""
    return {
        "primary_metric": config.primary_metric,
        "greater_is_better": config.greater_is_better,
        "seeds": list(config.seeds),
        "tuning_seeds": list(config.tuning_seeds),
        "budget": config.budget.to_dict(),
        "eval_splits": sorted({recipe.eval_split for recipe in config.arms.values()}),
        "comparisons": [asdict(question) for question in config.comparisons],
        "arms": {name: shlex.join(recipe.flags()) for name, recipe in config.arms.items()},
        "extractions": [shlex.join(replace(read, **MACHINE).flags()) for read in config.extractions],
    }


def declare(config: ExperimentConfig, runs_dir: Path) -> None:
    """Keep what an experiment asks. (For callers to see to: nothing in `runs_dir` is finished.)"""
    write_atomic(_path(runs_dir), (json.dumps(declaration(config), indent=1) + "\n").encode())


def kept_declaration(runs_dir: Path) -> dict[str, Any] | None:
    """What `declare` wrote; None where nobody did. Raises ConfigError for a file that is no declaration."""
    path = _path(runs_dir)
    if not path.exists():
        return None
    with reading(path, "Put it back, or delete it: reports then cannot say what was asked first"):
        kept = json.loads(path.read_bytes())
        if not (isinstance(kept, dict) and isinstance(kept.get("arms", {}), dict)):
            raise ValueError("no table, or none of arms")
        return kept


def changed_since(config: ExperimentConfig, runs_dir: Path) -> list[str] | None:
    """What the file says otherwise than it did before the first run was finished; None where nobody kept that. Raises
    what `kept_declaration` does."""
    kept = kept_declaration(runs_dir)
    if kept is None:
        return None
    now = declaration(config)
    return [_change(name, kept[name], said) for name, said in now.items() if name in kept and kept[name] != said]


def _change(name: str, first: Any, now: Any) -> str:
    """The name, and what was said first where it is short; of arms those with another recipe, new or gone."""
    if name == "arms":
        return f"arms ({', '.join(arm for arm in dict.fromkeys([*first, *now]) if first.get(arm) != now.get(arm))})"
    if name in ("comparisons", "extractions"):
        return name
    return f"{name} (was {first if isinstance(first, str) else json.dumps(first)})"


def _path(runs_dir: Path) -> Path:
    return runs_dir / "declaration.json"
