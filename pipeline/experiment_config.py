"""An experiment file: one TOML, checked in full before anything runs."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..kvcache.errors import ConfigError
from .config import DistillConfig
from .extract import ExtractConfig, default_store


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


def load_experiment(path: Path) -> ExperimentConfig:
    """Parse an experiment file. Raises ConfigError naming the file and the key that is wrong."""
    try:
        document = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"no experiment file at {path}", expected="a .toml file", found="nothing", remedy="Name one that is there"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML", expected="TOML", found=error, remedy="Mend the file") from error
    _require_keys(document, {f.name for f in fields(ExperimentConfig)} | {"base"}, str(path))
    arms = {
        name: DistillConfig.from_mapping({**document.get("base", {}), **overrides}, f"{path}: arms.{name}")
        for name, overrides in _table(document, "arms", path).items()
    }
    seeds = document["seeds"]
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(isinstance(s, int) for s in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise ConfigError(
            f"{path}: seeds", expected="a list of different whole numbers", found=seeds, remedy="Mend seeds"
        )
    return ExperimentConfig(
        name=str(document["name"]),
        primary_metric=str(document["primary_metric"]),
        seeds=tuple(seeds),
        extract=_extract_config(_table(document, "extract", path), path),
        arms=arms,
        comparisons=tuple(_comparison(entry, arms, path) for entry in document["comparisons"]),
    )


def _require_keys(document: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown, missing = sorted(set(document) - known), sorted(known - {"base"} - set(document))
    if unknown or missing:
        raise ConfigError(
            f"{where}: {'unknown' if unknown else 'missing'} key",
            expected=", ".join(sorted(known)),
            found=", ".join(unknown) if unknown else f"no {', '.join(missing)}",
            remedy="Mend the file",
        )


def _table(document: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    table = document.get(key)
    if not isinstance(table, dict) or not table:
        raise ConfigError(f"{path}: {key}", expected="a table with entries", found=table, remedy="Mend the file")
    return table


def _extract_config(table: dict[str, Any], path: Path) -> ExtractConfig:
    known = {field.name for field in fields(ExtractConfig)}
    if "model" not in table or not set(table) <= known:
        raise ConfigError(
            f"{path}: extract",
            expected=f"model, and any of {', '.join(sorted(known))}",
            found=", ".join(table),
            remedy="Mend the file",
        )
    store = Path(table["store"]) if "store" in table else default_store(table["model"])
    return ExtractConfig(**{**table, "store": store})


def _comparison(entry: Any, arms: Mapping[str, DistillConfig], path: Path) -> tuple[str, str]:
    found = tuple(entry.get(key) for key in ("arm", "control")) if isinstance(entry, dict) else (None, None)
    if not all(name in arms for name in found):
        raise ConfigError(
            f"{path}: comparisons",
            expected=f"arm and control from {', '.join(arms)}",
            found=entry,
            remedy="Mend the file",
        )
    return str(found[0]), str(found[1])


def _with_seed(config: DistillConfig, seed: int) -> DistillConfig:
    return DistillConfig(**{**config.to_dict(), "seed": seed})
