"""An experiment file: one TOML, checked in full before anything runs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from ..kvcache.errors import ConfigError
from .config import MAX_SEED, DistillConfig, parse_fields
from .extract import ExtractConfig, default_store
from .stats import COMPARED_METRICS


@dataclass(frozen=True)
class ExperimentConfig:
    """Arms by seeds, from one store. `arms` hold whole recipes: the base with the arm's own fields."""

    name: str
    primary_metric: str
    seeds: tuple[int, ...]
    extract: ExtractConfig
    arms: Mapping[str, DistillConfig]
    comparisons: tuple[tuple[str, str], ...]

    @property
    def runs(self) -> list[tuple[str, DistillConfig]]:
        """(run name, config) of the whole grid, seed by seed, so that pairs finish together."""
        return [
            (f"{arm}-seed{seed}", _with_seed(config, seed)) for seed in self.seeds for arm, config in self.arms.items()
        ]


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Parse an experiment file, with `overrides` such as `extract.samples=200` in place of its own values.

    Raises ConfigError naming the file and the key that is wrong.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"no experiment file at {path}", expected="a .toml file", found="nothing", remedy="Name one that is there"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML", expected="TOML", found=error, remedy="Mend the file") from error
    for override in overrides:
        _override(document, override)
    _require_keys(document, path)
    arms = _arms(document, path)
    return ExperimentConfig(
        name=_name(document["name"], "name", path),
        primary_metric=_metric(document["primary_metric"], path),
        seeds=_seeds(document["seeds"], path),
        extract=_extract_config(_table(document, "extract", path), path),
        arms=arms,
        comparisons=_comparisons(document["comparisons"], arms, path),
    )


def _override(document: dict[str, Any], override: str) -> None:
    """Put `table.key=value` into the document; a value that is not TOML is taken as text."""
    dotted, equals, text = override.partition("=")
    *tables, key = dotted.split(".")
    for name in tables:
        document = document.setdefault(name, {})
    if not equals or not isinstance(document, dict):
        raise ConfigError("no such override", expected="KEY=VALUE", found=override, remedy="Mend --set")
    try:
        document[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        document[key] = text


def _require_keys(document: Mapping[str, Any], path: Path) -> None:
    required = {field.name for field in fields(ExperimentConfig)}
    unknown, missing = sorted(document.keys() - required - {"base"}), sorted(required - document.keys())
    if unknown or missing:
        raise ConfigError(
            f"{path}: {'unknown' if unknown else 'missing'} key",
            expected=", ".join(sorted(required | {"base"})),
            found=", ".join(unknown) if unknown else f"no {', '.join(missing)}",
            remedy="Mend the file",
        )


def _refuse(path: Path, key: str, expected: str, found: object) -> ConfigError:
    return ConfigError(f"{path}: {key}", expected=expected, found=found, remedy="Mend the file")


def _table(document: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    table = document[key]
    if not isinstance(table, dict) or not table:
        raise _refuse(path, key, "a table with entries", table)
    return table


def _name(name: Any, key: str, path: Path) -> str:
    """Names become folders and table cells."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise _refuse(path, key, "letters, digits, dots, dashes and underscores", repr(name))
    return name


def _metric(metric: Any, path: Path) -> str:
    if metric not in COMPARED_METRICS:
        raise _refuse(path, "primary_metric", " or ".join(COMPARED_METRICS), metric)
    return str(metric)


def _arms(document: Mapping[str, Any], path: Path) -> dict[str, DistillConfig]:
    base = _table(document, "base", path) if "base" in document else {}
    arms = {}
    for name, overrides in _table(document, "arms", path).items():
        key = f"arms.{_name(name, 'arms', path)}"
        if not isinstance(overrides, dict):
            raise _refuse(path, key, "a table", repr(overrides))
        if "seed" in {**base, **overrides}:
            raise _refuse(path, key, "no seed of its own: seeds are listed at the top", "seed")
        arms[name] = DistillConfig.from_mapping({**base, **overrides}, f"{path}: {key}")
    return arms


def _seeds(seeds: Any, path: Path) -> tuple[int, ...]:
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < MAX_SEED for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise _refuse(path, "seeds", "a list of different whole numbers, 0 or more", seeds)
    return tuple(seeds)


def _extract_config(table: dict[str, Any], path: Path) -> ExtractConfig:
    if "model" not in table:
        raise _refuse(path, "extract", "a model", ", ".join(table))
    options = parse_fields(table, {**get_type_hints(ExtractConfig), "store": str}, f"{path}: extract")
    store = Path(options["store"]) if "store" in options else default_store(options["model"])
    return ExtractConfig(**{**options, "store": store})


def _comparisons(entries: Any, arms: Mapping[str, DistillConfig], path: Path) -> tuple[tuple[str, str], ...]:
    if not isinstance(entries, list) or not entries:
        raise _refuse(path, "comparisons", "a list of tables with arm and control", entries)
    return tuple(_comparison(entry, arms, path) for entry in entries)


def _comparison(entry: Any, arms: Mapping[str, DistillConfig], path: Path) -> tuple[str, str]:
    known = isinstance(entry, dict) and entry.keys() == {"arm", "control"}
    pair = [name for name in arms if name in entry.values()] if known else []
    if len(pair) != 2:
        raise _refuse(path, "comparisons", f"a different arm and control from {', '.join(arms)}", entry)
    return entry["arm"], entry["control"]


def _with_seed(config: DistillConfig, seed: int) -> DistillConfig:
    return DistillConfig(**{**config.to_dict(), "seed": seed})
