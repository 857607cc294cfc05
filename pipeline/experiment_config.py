"""An experiment: what is compared with what, on which seeds and by which measure, all declared before anything runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from ..kvcache.errors import ConfigError
from .config import DistillConfig
from .experiment_file import ExperimentFile
from .extract_config import MAX_SEED, ExtractConfig, default_store
from .fields import FieldError, Where, parse_fields, placed
from .questions import COMPARED_METRICS, LOWER_IS_BETTER, Question

EXTRACT = "extract"
"""What an arm of several stores calls that of the table [extract]."""

SHARED = ("student", "random_init", "eval_split", "max_new_tokens")
"""What arms that are compared have in common: the student, and how it is measured."""


@dataclass(frozen=True)
class Budget:
    """How long every arm trains, by one of its fields, which are those of a recipe."""

    epochs: float | None = None
    max_steps: int | None = None
    max_train_tokens: int | None = None

    def to_dict(self) -> dict[str, float | int]:
        """The one that is given."""
        return {entry.name: value for entry in fields(self) if (value := getattr(self, entry.name)) is not None}


@dataclass(frozen=True)
class PlannedRun:
    """An arm with a seed, and the stores that it reads."""

    arm: str
    recipe: DistillConfig
    stores: tuple[Path, ...]

    @property
    def name(self) -> str:
        return run_name(self.arm, self.recipe.seed)


def run_name(arm: str, seed: int) -> str:
    """Of the run, its folder and its log."""
    return f"{arm}-seed{seed}"


@dataclass(frozen=True)
class ExperimentConfig:
    """Arms by seeds. `arms` hold whole recipes: the base with the budget and the arm's own fields.

    All arms read the store of `extract`, but for those that `arm_stores` gives some of `stores`: the same extraction
    with some options changed. `tuning_seeds` are those that choices were made on: none of them is reported.
    """

    name: str
    primary_metric: str
    greater_is_better: bool
    seeds: tuple[int, ...]
    extract: ExtractConfig
    budget: Budget
    arms: Mapping[str, DistillConfig]
    comparisons: tuple[Question, ...]
    tuning_seeds: tuple[int, ...] = ()
    stores: Mapping[str, ExtractConfig] = field(default_factory=dict)
    arm_stores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    command: str = ""
    """That runs it."""

    def stores_of(self, arm: str) -> tuple[ExtractConfig, ...]:
        """The extractions that an arm reads. Its text is that of the first."""
        named = {**self.stores, EXTRACT: self.extract}
        return tuple(named[name] for name in self.arm_stores.get(arm, (EXTRACT,)))

    @property
    def extractions(self) -> list[ExtractConfig]:
        """Those that some arm reads."""
        return list(dict.fromkeys(store for arm in self.arms for store in self.stores_of(arm)))

    @property
    def runs(self) -> list[PlannedRun]:
        """The whole grid, seed by seed, so that pairs finish together."""
        return [
            PlannedRun(arm, _with_seed(recipe, seed), tuple(read.store for read in self.stores_of(arm)))
            for seed in self.seeds
            for arm, recipe in self.arms.items()
        ]


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Parse an experiment file, with `overrides` such as `extract.samples=200` in place of its own values.

    Raises ConfigError naming the file, the line and the key that is wrong.
    """
    file = ExperimentFile.read(path, overrides)
    _require_keys(file)
    extract, stores, budget = _extract_config(file, file.table("extract")), _stores(file), _budget(file)
    arms, arm_stores = _arms(file, {**stores, EXTRACT: extract}, budget)
    metric = _metric(file)
    seeds, tuning_seeds = _seeds(file)
    return ExperimentConfig(
        name=_name(file, file.document["name"], "name"),
        primary_metric=metric,
        greater_is_better=metric not in LOWER_IS_BETTER,
        seeds=seeds,
        tuning_seeds=tuning_seeds,
        extract=extract,
        stores=stores,
        budget=budget,
        arms=arms,
        arm_stores=arm_stores,
        comparisons=_comparisons(file, arms),
        command=shlex.join(["kvpipe", "experiment", "run", str(path), *(f"--set={given}" for given in overrides)]),
    )


def _require_keys(file: ExperimentFile) -> None:
    optional = {"base", "stores", "tuning_seeds"}
    required = {entry.name for entry in fields(ExperimentConfig)} - optional - {"arm_stores", "command"}
    unknown, missing = sorted(file.document.keys() - required - optional), sorted(required - file.document.keys())
    if unknown or missing:
        raise ConfigError(
            f"{file.where(unknown[0])}: unknown key" if unknown else f"{file.path}: missing key",
            expected=", ".join(sorted(required | optional) if unknown else missing),
            found=", ".join(unknown) if unknown else f"no {', '.join(missing)}",
            remedy="Mend it there" if unknown else "Mend the file",
        )


def _name(file: ExperimentFile, name: Any, key: str) -> str:
    """Names become folders and table cells."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise file.refuse(key, "letters, digits, dots, dashes and underscores", repr(name))
    return name


def _metric(file: ExperimentFile) -> str:
    metric, greater = file.document["primary_metric"], file.document["greater_is_better"]
    if metric not in COMPARED_METRICS:
        raise file.refuse("primary_metric", " or ".join(COMPARED_METRICS), metric)
    expected = metric not in LOWER_IS_BETTER
    if greater is not expected:
        raise file.refuse("greater_is_better", f"{str(expected).lower()}, for {metric}", str(greater).lower())
    return str(metric)


def _seeds(file: ExperimentFile) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those that are reported, and those that choices were made on."""
    reported = _seed_list(file, "seeds")
    tuning = _seed_list(file, "tuning_seeds") if "tuning_seeds" in file.document else ()
    if both := sorted(set(reported) & set(tuning)):
        raise file.refuse("seeds", "none of the tuning_seeds", ", ".join(map(str, both)))
    return reported, tuning


def _seed_list(file: ExperimentFile, key: str) -> tuple[int, ...]:
    seeds = file.document[key]
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < MAX_SEED for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise file.refuse(key, "a list of different whole numbers, 0 or more", seeds)
    return tuple(seeds)


def _budget(file: ExperimentFile) -> Budget:
    options = parse_fields(file.table("budget"), get_type_hints(Budget), partial(file.where, "budget"))
    if len(options) != 1:
        raise file.refuse("budget", f"one of {', '.join(get_type_hints(Budget))}", ", ".join(options))
    if not (value := next(iter(options.values()))) > 0:
        raise file.refuse(f"budget.{next(iter(options))}", "more than 0", value)
    return Budget(**options)


def _extract_config(
    file: ExperimentFile, table: dict[str, Any], key: str = "extract", default_name: str | None = None
) -> ExtractConfig:
    if "model" not in table:
        raise file.refuse(key, "a model", ", ".join(table))
    options = parse_fields(table, {**get_type_hints(ExtractConfig), "store": str}, partial(file.where, key))
    store = Path(options["store"]) if "store" in options else default_store(default_name or options["model"])
    with placed(partial(file.where, key), ""):
        return ExtractConfig(**{**options, "store": store})


def _stores(file: ExperimentFile) -> dict[str, ExtractConfig]:
    if "stores" not in file.document:
        return {}
    own, stores = file.table("extract"), {}
    for name, changes in file.table("stores").items():
        key = f"stores.{_name(file, name, 'stores')}"
        if name == EXTRACT:
            raise file.refuse(key, f"another name: {EXTRACT} is the store of [extract]", name)
        if not isinstance(changes, dict):
            raise file.refuse(key, "a table", repr(changes))
        # A store of its own has a place of its own.
        table = {**{option: value for option, value in own.items() if option != "store"}, **changes}
        stores[name] = _extract_config(file, table, key, f"{table.get('model')}-{name}")
    places = [store.store for store in (_extract_config(file, own), *stores.values())]
    if len(set(places)) < len(places):
        raise file.refuse("stores", "a place of its own for every store", ", ".join(map(str, places)))
    return stores


def _arms(
    file: ExperimentFile, stores: Mapping[str, ExtractConfig], budget: Budget
) -> tuple[dict[str, DistillConfig], dict[str, tuple[str, ...]]]:
    """The recipes by arm, and the names of the `stores` of those that name any."""
    base = file.table("base") if "base" in file.document else {}
    # An arm may override all of it, but what is no option is a mistake.
    own = {name: value for name, value in base.items() if name != "store"}
    parse_fields(own, get_type_hints(DistillConfig), partial(file.where, "base"))
    arms, arm_stores = {}, {}
    for name, overrides in file.table("arms").items():
        key = f"arms.{_name(file, name, 'arms')}"
        if not isinstance(overrides, dict):
            raise file.refuse(key, "a table", repr(overrides))
        recipe = {**base, **overrides}
        where = partial(_where_of_arm, file, key, overrides)
        _require_no_budget_of_its_own(recipe, where)
        if "store" in recipe:
            arm_stores[name] = _arm_stores(file, f"{key}.store", recipe.pop("store"), stores)
        arms[name] = DistillConfig.from_mapping({**recipe, **budget.to_dict()}, where)
        _require_readable(arms[name], [stores[read] for read in arm_stores.get(name, (EXTRACT,))], where)
    _require_equal_batches(file, arms, budget)
    return arms, arm_stores


def _arm_stores(file: ExperimentFile, key: str, found: Any, stores: Mapping[str, ExtractConfig]) -> tuple[str, ...]:
    """A name, or a list of different ones."""
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not names or any(name not in list(stores) for name in names):
        raise file.refuse(key, " or ".join(stores) if len(stores) > 1 else "a table [stores]", found)
    if len(set(names)) < len(names):
        raise file.refuse(key, "every store once", found)
    return tuple(names)


def _require_readable(recipe: DistillConfig, stores: Sequence[ExtractConfig], where: Where) -> None:
    """Raise ConfigError for a recipe that these stores cannot serve, before any of them is written."""
    with placed(where, "fusion"):
        recipe.require_fusion(len(stores))
        if recipe.reads_queries and not all(read.queries for read in stores):
            raise FieldError("kv_loss", "one that needs no queries, or queries = true for the store", recipe.kv_loss)


def _where_of_arm(file: ExperimentFile, key: str, overrides: Mapping[str, Any], name: str) -> str:
    """A field that is wrong is the arm's, unless the arm leaves it to the base or the budget."""
    inherited = next((table for table in ("base", "budget") if name in file.document.get(table, {})), None)
    return file.where(inherited, name) if inherited and name not in overrides else file.where(key, name)


def _require_no_budget_of_its_own(recipe: Mapping[str, Any], where: Where) -> None:
    for name, place in {"seed": "seeds, at the top", **dict.fromkeys(get_type_hints(Budget), "[budget]")}.items():
        if name in recipe:
            expected = f"it in {place}, where it is the same for all arms"
            raise ConfigError(where(name), expected=expected, found=name, remedy="Mend it there")


def _require_equal_batches(file: ExperimentFile, arms: Mapping[str, DistillConfig], budget: Budget) -> None:
    """A step is a step only where all take the same number of samples; so is an epoch where all have as many."""
    for name in ("batch_size", *(["samples"] if budget.epochs is not None else [])):
        if len(found := {getattr(recipe, name) for recipe in arms.values()}) > 1:
            shown = ", ".join(sorted(map(str, found)))
            remedy = " (or a budget in steps or tokens)" if name == "samples" else ""
            raise file.refuse(f"arms: {name}", f"the same for all arms{remedy}", shown)


def _comparisons(file: ExperimentFile, arms: Mapping[str, DistillConfig]) -> tuple[Question, ...]:
    entries = file.document["comparisons"]
    if not isinstance(entries, list) or not entries:
        raise file.refuse("comparisons", "a list of tables with arm and control", entries)
    found: list[Question] = []
    for number, entry in enumerate(entries):
        question = _comparison(file, key := f"comparisons.{number}", entry, arms)
        if question in found:
            raise file.refuse(key, "every question once", f"{question.arm} against {question.control} again")
        found.append(question)
    return tuple(found)


def _comparison(file: ExperimentFile, key: str, entry: Any, arms: Mapping[str, DistillConfig]) -> Question:
    if not (isinstance(entry, dict) and {"arm", "control"} <= entry.keys() <= {"arm", "control", "margin"}):
        raise file.refuse(key, "arm and control, and at most a margin", entry)
    for side in ("arm", "control"):
        if entry[side] not in list(arms):
            raise file.refuse(f"{key}.{side}", " or ".join(arms), repr(entry[side]))
    pair = (entry["arm"], entry["control"])
    if pair[0] == pair[1]:
        raise file.refuse(key, "two different arms", f"{pair[0]} twice")
    margin = entry.get("margin")
    for name in SHARED:
        if len(found := {str(getattr(arms[arm], name)) for arm in pair}) > 1:
            raise file.refuse(f"{key}: {name}", f"the same for {' and '.join(pair)}", " and ".join(sorted(found)))
    if margin is not None and not (type(margin) in (int, float) and 0 < margin < float("inf")):
        raise file.refuse(f"{key}.margin", "a finite number above 0", repr(margin))
    return Question(entry["arm"], entry["control"], margin)


def _with_seed(config: DistillConfig, seed: int) -> DistillConfig:
    return DistillConfig(**{**config.to_dict(), "seed": seed})
