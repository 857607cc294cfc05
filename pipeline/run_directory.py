"""A run on disk: what it is (`config.json`), how far it came (`checkpoints/`), what came out (`run.json`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..kvcache.errors import ConfigError
from ..kvcache.files import PARTIAL, write_atomic
from ..kvcache.integrity import file_checksums, require_files, require_seal, seal
from ..kvcache.manifest import first_difference
from ..kvcache.store import KVStore
from .config import DistillConfig
from .reading import reading
from .student_files import student_files

SHAPE: dict[str, type] = {
    **dict.fromkeys(("config", "metrics", "pairing", "parameters", "seconds", "student", "versions"), dict),
    **dict.fromkeys(("steps", "tokens", "train_samples", "common_samples", "teacher_forwards", "threads"), int),
    **dict.fromkeys(("collapsed", "absorbed", "router_collapsed"), bool),
    "stores": list,
    "data_wait_share": float,
}
"""What everybody who reads a record takes for granted."""

NUMBERS = {
    "metrics": ("ce", "token_accuracy"),
    "parameters": ("student", "aligner"),
    "seconds": ("setup", "train", "data_wait", "evaluation", "total"),
}
"""Of the parts that hold numbers, or None for what could not be measured, those that are always there."""


def run_identity(config: DistillConfig, stores: Sequence[KVStore]) -> dict[str, Any]:
    """What makes two runs the same run: the recipe, the stores' manifests, in their order, and the student's files."""
    return {
        "config": config.to_dict(),
        "stores": [store.manifest.hash for store in stores],
        "student": student_files(config.student),
    }


def run_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a finished run, from its record."""
    return {
        "config": record["config"],
        "stores": [store["manifest"] for store in record["stores"]],
        "student": record["student"],
    }


class RunDirectory:
    """One run's folder. It belongs to one recipe and its stores; another recipe is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.resolve().name
        self.metrics = path / "metrics.jsonl"
        self.predictions = path / "predictions.jsonl"
        self.student = path / "student"
        self.checkpoints = path / "checkpoints"

    def teachers(self, number: int) -> list[Path]:
        """Where the aligner and the layer map of each teacher lie: of one in the folder itself."""
        return [self.path] if number == 1 else [self.path / f"teacher-{k}" for k in range(number)]

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; one that is still being written does not count."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().split("\n")[:-1]]

    def read_record(self) -> dict[str, Any] | None:
        """`run.json`, or None while the run is not finished. Raises ConfigError where it is damaged, or the curve or
        the predictions are."""
        path = self.path / "run.json"
        if not path.exists():
            return None
        with reading(self.path, self._remedy):
            record = json.loads(path.read_bytes())
            require_seal(record)
            _require_shape(record)
            if run_of(record) != _parse(self.path / "config.json"):
                raise ValueError("run.json is that of another run")
            require_files(
                self.path, {path.name: record["files"][path.name] for path in (self.metrics, self.predictions)}
            )
        return dict(record)

    def require_outputs(self, record: Mapping[str, Any]) -> None:
        """Raise ConfigError where the student or the aligner of a finished run is gone or damaged."""
        with reading(self.path, self._remedy):
            require_files(self.path, record["files"])

    @property
    def _remedy(self) -> str:
        return f"Delete {self.path / 'run.json'}: the same command then goes on from the run's last checkpoint"

    def require_outside(self, inputs: Iterable[Path]) -> None:
        """Raise ConfigError for what a run reads where it lies in the folder that it would overwrite."""
        folder = self.path.resolve()
        for path in inputs:
            if path.exists() and folder in [path.resolve(), *path.resolve().parents]:
                raise ConfigError(
                    f"--overwrite would delete {path}, which the run reads",
                    expected="it outside of the run's folder",
                    found=f"it in {self.path}",
                    remedy="Choose another --output-dir, or move it",
                )

    def claim(self, identity: dict[str, Any], *, overwrite: bool) -> None:
        """Take the folder for a run. With `overwrite` the run in it goes first."""
        self.require_free(identity, overwrite=overwrite)
        if overwrite and self.path.exists():
            # Renamed first: an interruption never leaves a folder that is half a run.
            folder = self.path.resolve()
            discarded = folder.with_name(f".{folder.name}{PARTIAL}")
            shutil.rmtree(discarded, ignore_errors=True)
            folder.rename(discarded)
            folder.mkdir()
            shutil.rmtree(discarded)
        write_atomic(self.path / "config.json", _pretty(identity))

    def require_free(self, identity: dict[str, Any], *, overwrite: bool) -> None:
        """Raise ConfigError where the folder is not a run's or, without `overwrite`, a different run's: then the
        error names the field."""
        if not self._holds_run():
            if self.path.is_dir() and any(path.suffix != PARTIAL for path in self.path.iterdir()):
                raise ConfigError(
                    f"{self.path} is not a run directory, or its config.json is damaged",
                    expected="an empty folder, or one with a run's config.json",
                    found="other files",
                    remedy="Choose another --output-dir, or delete this one",
                )
        elif not overwrite:
            self._require_same(identity)

    def _holds_run(self) -> bool:
        """A model's folder has a config.json too, and must never be overwritten. (One that is only half written is
        what a killed run left.)"""
        config = _parse(self.path / "config.json")
        return config is not None and config.keys() == {"config", "stores", "student"}

    def _require_same(self, identity: dict[str, Any]) -> None:
        if difference := first_difference(identity, _parse(self.path / "config.json") or {}):
            name, expected, found = difference
            raise ConfigError(
                f"{self.path} holds another run ({name} differs)",
                expected=expected,
                found=found,
                remedy="Choose another folder (--output-dir, of an experiment --runs-dir), or delete this one "
                "(`distill --overwrite` does)",
            )

    def finish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write `run.json`, with the checksums of all that the run left but its checkpoints: it is done."""
        outputs = [
            self.metrics,
            self.predictions,
            *self.path.glob("aligner.*"),
            *self.path.glob("layer_map.json"),
            *self.path.glob("teacher-*/*"),
            *self.student.rglob("*"),
        ]
        files = file_checksums(self.path, filter(Path.is_file, outputs), flush=True)
        sealed = seal({**record, "files": files})
        write_atomic(self.path / "run.json", _pretty(sealed))
        return sealed


def _require_shape(record: Mapping[str, Any]) -> None:
    """Raise ValueError for a record that another version wrote, or nobody."""
    for name, kind in SHAPE.items():
        if type(record.get(name)) is not kind:
            raise ValueError(f"{name} is no {kind.__name__}")
    if type(record.get("kv_gradient_share", "")) not in (float, type(None)):
        raise ValueError("kv_gradient_share is no float")
    for name, always in NUMBERS.items():
        values = record[name]
        if not all(value is None or type(value) in (int, float) for value in values.values()):
            raise ValueError(f"{name} holds other things than numbers")
        if missing := [part for part in always if values.get(part) is None]:
            raise ValueError(f"{name} has no {missing[0]}")


def _pretty(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _parse(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where the file holds no such thing."""
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
