"""An experiment file: one TOML, checked in full before anything runs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from ..kvcache.errors import ConfigError
from .config import MAX_SEED, DistillConfig, parse_fields
from .extract_config import ExtractConfig, default_store
from .stats import COMPARED_METRICS, Question


@dataclass(frozen=True)
class PlannedRun:
    """An arm with a seed, and the store that it reads."""

    name: str
    arm: str
    recipe: DistillConfig
    store: Path


@dataclass(frozen=True)
class ExperimentConfig:
    """Arms by seeds. `arms` hold whole recipes: the base with the arm's own fields.

    All arms read the store of `extract`, but for those that `arm_stores` gives one of `stores`: the same extraction
    with some options changed.
    """

    name: str
    primary_metric: str
    seeds: tuple[int, ...]
    extract: ExtractConfig
    arms: Mapping[str, DistillConfig]
    comparisons: tuple[Question, ...]
    stores: Mapping[str, ExtractConfig] = field(default_factory=dict)
    arm_stores: Mapping[str, str] = field(default_factory=dict)

    def store_of(self, arm: str) -> ExtractConfig:
        """The extraction that an arm reads."""
        return self.stores[self.arm_stores[arm]] if arm in self.arm_stores else self.extract

    @property
    def extractions(self) -> list[ExtractConfig]:
        """Those that some arm reads."""
        return list(dict.fromkeys(self.store_of(arm) for arm in self.arms))

    @property
    def runs(self) -> list[PlannedRun]:
        """The whole grid, seed by seed, so that pairs finish together."""
        return [
            PlannedRun(f"{arm}-seed{seed}", arm, _with_seed(recipe, seed), self.store_of(arm).store)
            for seed in self.seeds
            for arm, recipe in self.arms.items()
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
    stores = _stores(document, path)
    arms, arm_stores = _arms(document, stores, path)
    return ExperimentConfig(
        name=_name(document["name"], "name", path),
        primary_metric=_metric(document["primary_metric"], path),
        seeds=_seeds(document["seeds"], path),
        extract=_extract_config(_table(document, "extract", path), path),
        stores=stores,
        arms=arms,
        arm_stores=arm_stores,
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
    optional = {"base", "stores"}
    required = {entry.name for entry in fields(ExperimentConfig)} - optional - {"arm_stores"}
    unknown, missing = sorted(document.keys() - required - optional), sorted(required - document.keys())
    if unknown or missing:
        raise ConfigError(
            f"{path}: {'unknown' if unknown else 'missing'} key",
            expected=", ".join(sorted(required | optional)),
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


def _stores(document: Mapping[str, Any], path: Path) -> dict[str, ExtractConfig]:
    if "stores" not in document:
        return {}
    own, stores = _table(document, "extract", path), {}
    for name, changes in _table(document, "stores", path).items():
        key = f"stores.{_name(name, 'stores', path)}"
        if not isinstance(changes, dict):
            raise _refuse(path, key, "a table", repr(changes))
        # A store of its own has a place of its own.
        table = {**{option: value for option, value in own.items() if option != "store"}, **changes}
        stores[name] = _extract_config(table, path, key, f"{table.get('model')}-{name}")
    places = [store.store for store in (_extract_config(own, path), *stores.values())]
    if len(set(places)) < len(places):
        raise _refuse(path, "stores", "a place of its own for every store", ", ".join(map(str, places)))
    return stores


def _arms(
    document: Mapping[str, Any], stores: Mapping[str, ExtractConfig], path: Path
) -> tuple[dict[str, DistillConfig], dict[str, str]]:
    """The recipes by arm, and the stores of those that name one."""
    base = _table(document, "base", path) if "base" in document else {}
    arms, arm_stores = {}, {}
    for name, overrides in _table(document, "arms", path).items():
        key = f"arms.{_name(name, 'arms', path)}"
        if not isinstance(overrides, dict):
            raise _refuse(path, key, "a table", repr(overrides))
        if "seed" in {**base, **overrides}:
            raise _refuse(path, key, "no seed of its own: seeds are listed at the top", "seed")
        recipe = {**base, **overrides}
        if "store" in recipe:
            arm_stores[name] = recipe.pop("store")
            if arm_stores[name] not in list(stores):
                raise _refuse(path, f"{key}.store", " or ".join(stores) or "a table [stores]", arm_stores[name])
        arms[name] = DistillConfig.from_mapping(recipe, f"{path}: {key}")
    return arms, arm_stores


def _seeds(seeds: Any, path: Path) -> tuple[int, ...]:
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < MAX_SEED for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise _refuse(path, "seeds", "a list of different whole numbers, 0 or more", seeds)
    return tuple(seeds)


def _extract_config(
    table: dict[str, Any], path: Path, key: str = "extract", default_name: str | None = None
) -> ExtractConfig:
    if "model" not in table:
        raise _refuse(path, key, "a model", ", ".join(table))
    options = parse_fields(table, {**get_type_hints(ExtractConfig), "store": str}, f"{path}: {key}")
    store = Path(options["store"]) if "store" in options else default_store(default_name or options["model"])
    return ExtractConfig(**{**options, "store": store})


def _comparisons(entries: Any, arms: Mapping[str, DistillConfig], path: Path) -> tuple[Question, ...]:
    if not isinstance(entries, list) or not entries:
        raise _refuse(path, "comparisons", "a list of tables with arm and control", entries)
    return tuple(_comparison(entry, arms, path) for entry in entries)


def _comparison(entry: Any, arms: Mapping[str, DistillConfig], path: Path) -> Question:
    known = isinstance(entry, dict) and {"arm", "control"} <= entry.keys() <= {"arm", "control", "margin"}
    pair = [name for name in arms if name in (entry["arm"], entry["control"])] if known else []
    if len(pair) != 2:
        raise _refuse(path, "comparisons", f"a different arm and control from {', '.join(arms)}", entry)
    margin = entry.get("margin")
    if margin is not None and not (type(margin) in (int, float) and 0 < margin < float("inf")):
        raise _refuse(path, "comparisons", "a margin above 0", margin)
    return Question(entry["arm"], entry["control"], margin)


def _with_seed(config: DistillConfig, seed: int) -> DistillConfig:
    return DistillConfig(**{**config.to_dict(), "seed": seed})
