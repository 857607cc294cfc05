"""Two reports side by side: what was declared differently, and what came out differently."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kvcache.errors import ConfigError
from ..kvcache.manifest import flatten


@dataclass(frozen=True)
class Difference:
    """One thing that two reports say differently; None where only the other says it."""

    what: str
    first: Any
    second: Any


@dataclass(frozen=True)
class ReportDiff:
    """`declared`: configuration, stores and recipes. `outcomes`: arms' means of the primary metric, and verdicts with
    their mean differences."""

    declared: list[Difference]
    outcomes: list[Difference]


def diff_reports(first: Path, second: Path) -> ReportDiff:
    """Compare two report folders, or their `results.json`. Raises ConfigError for what is no report."""
    declared, outcomes = zip(*map(_read, (first, second)), strict=True)
    return ReportDiff(list(_differences(*declared)), list(_differences(*outcomes)))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a report declares, and what came out."""
    file = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(file.read_bytes())
        return _declared(results), _outcomes(results)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"no report at {path}",
            expected="a folder with results.json, as `kvpipe experiment` writes it",
            found=f"no {error}" if isinstance(error, KeyError) else error,
            remedy="Name one, for example reports/ab",
        ) from error


def _declared(results: Mapping[str, Any]) -> dict[str, Any]:
    stores = {f"store {store['path']}": store["manifest"] for store in results["stores"]}
    commands = {f"arm {arm}": command for arm, command in results["commands"].items()}
    declared = {name: said for name, said in results["declared"].items() if name != "arms"}
    return flatten({"primary_metric": results["primary_metric"], **declared, **stores}) | commands


def _outcomes(results: Mapping[str, Any]) -> dict[str, Any]:
    metric = results["primary_metric"]
    found: dict[str, Any] = {f"failed {name}": said for name, said in results["failures"].items()}
    for arm in dict.fromkeys(run["arm"] for run in results["runs"]):
        runs = [run["scores"] for run in results["runs"] if run["arm"] == arm]
        if scores := [run[metric] for run in runs if metric in run]:
            found[f"mean {metric} of {arm}"] = f"{sum(scores) / len(scores):.4f} over {len(scores)} seeds"
    for c in results["comparisons"][metric]:
        mean = "—" if c["mean_difference"] is None else f"{c['mean_difference']:.4f}"
        within = f" within {c['margin']:g}" if c["margin"] is not None else ""
        found[f"{c['arm']} - {c['control']}{within}"] = f"{c['verdict'] or 'no verdict'} ({mean})"
    return found


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    for what in dict.fromkeys([*first, *second]):
        if first.get(what) != second.get(what):
            yield Difference(what, first.get(what), second.get(what))
