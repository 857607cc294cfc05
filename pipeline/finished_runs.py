"""The runs of an experiment that are there already, read without running anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..kvcache.errors import ConfigError
from ..kvcache.manifest import hash_json
from ..kvcache.store import KVStore
from .config import DistillConfig
from .declaration import declaration, kept_declaration
from .experiment_config import ExperimentConfig
from .experiment_status import experiment_status
from .run_directory import RunDirectory, run_identity
from .split_hygiene import require_disjoint_splits, split_hashes


@dataclass(frozen=True)
class ExperimentRuns:
    """What came of the grid: records by run name, and the error of each failed run."""

    records: dict[str, dict[str, Any]]
    failures: dict[str, str]


def finished_runs(config: ExperimentConfig, runs_dir: Path) -> ExperimentRuns:
    """What is there already, without running anything. Raises StoreError for an incomplete store, ConfigError for one
    of another extraction than the file's, for held-out text that is in the training text, and where a folder holds
    another run than the file's."""
    stores = {extraction.store: KVStore.open(extraction.store) for extraction in config.extractions}
    for extraction in config.extractions:
        store = stores[extraction.store]
        store.require_complete()
        manifest = store.manifest
        asked = replace(manifest, **extraction.declared(manifest.teacher.num_layers))
        asked.require_same(manifest, str(store.path))
    require_comparable(config, stores)
    for run in config.runs:
        is_finished(runs_dir / run.name, run.recipe, [stores[place] for place in run.stores])
    records = read_records(config, runs_dir)
    failed = (run for run in experiment_status(config, runs_dir) if run.state == "failed" and run.name not in records)
    return ExperimentRuns(records, {run.name: run.said for run in failed})


def settled_runs(config: ExperimentConfig, runs_dir: Path) -> ExperimentRuns | None:
    """As `finished_runs`, where the whole grid is finished and its stores are whole and declared as when it began:
    nothing is asked of a teacher then. None elsewhere."""
    kept = kept_declaration(runs_dir)
    if kept is None or kept.get("extractions") != declaration(config)["extractions"]:
        return None
    files = [extraction.store / "zarr.json" for extraction in config.extractions]
    files += [runs_dir / run.name / "run.json" for run in config.runs]
    if not all(file.is_file() for file in files):
        return None
    if not all(KVStore.open(extraction.store).complete for extraction in config.extractions):
        return None
    return finished_runs(config, runs_dir)


def require_comparable(config: ExperimentConfig, stores: Mapping[Path, KVStore]) -> None:
    """Every text once: splits that are disjoint, and the same for arms that are compared."""
    splits = {place: split_hashes(store) for place, store in stores.items()}
    for store in {hash_json(splits[place]): store for place, store in stores.items()}.values():
        require_disjoint_splits(store)
    for question in config.comparisons:
        arm, control = (config.stores_of(name)[0].store for name in (question.arm, question.control))
        if splits[arm] != splits[control]:
            raise ConfigError(
                f"{question.arm} and {question.control} cannot be compared: {arm} and {control} hold other text",
                expected=splits[control],
                found=splits[arm],
                remedy="Compare arms whose stores are of the same samples, with the same reasoning",
            )


def read_records(config: ExperimentConfig, runs_dir: Path) -> dict[str, dict[str, Any]]:
    return {run.name: record for run in config.runs if (record := RunDirectory(runs_dir / run.name).read_record())}


def is_finished(path: Path, recipe: DistillConfig, stores: Sequence[KVStore]) -> bool:
    """Whether the run is there already. Raises ConfigError where its folder holds another run."""
    run = RunDirectory(path)
    if run.read_record() is None:
        return False
    run.require_free(run_identity(recipe, stores), overwrite=False)
    return True
