"""A run's checkpoints: sealed once they are whole, found again, never those of another run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..kvcache.errors import ConfigError
from ..kvcache.files import write_atomic
from ..kvcache.integrity import file_checksums, require_files, require_seal, seal
from ..kvcache.manifest import first_difference
from .reading import reading

SEAL = "checkpoint.json"
REMEDY = "Delete it: the same command then goes on from the one before, or starts the run anew"


def seal_checkpoint(folder: Path, run: Mapping[str, Any]) -> None:
    """Write `checkpoint.json`: whose checkpoint this is, and what its files hold. Without it there is no checkpoint."""
    files = file_checksums(folder, [path for path in folder.iterdir() if path.name != SEAL], flush=True)
    write_atomic(folder / SEAL, json.dumps(seal({"name": folder.name, "run": run, "files": files})).encode())


def last_checkpoint(folder: Path, run: Mapping[str, Any]) -> Path | None:
    """The latest sealed checkpoint of a run. Raises ConfigError where it is damaged, or of another run or step."""
    found = _checkpoints(folder)
    sealed = [step for step, path in found.items() if (path / SEAL).is_file()]
    if not sealed:
        return None
    last = found[max(sealed)]
    with reading(last, REMEDY):
        document = json.loads((last / SEAL).read_bytes())
        require_seal(document)
        require_files(last, document["files"])
    wanted = {"name": last.name, "run": run}
    if difference := first_difference(wanted, {name: document.get(name, {}) for name in wanted}):
        name, expected, other = difference
        raise ConfigError(
            f"{last} is the checkpoint of another run or step ({name} differs)",
            expected=expected,
            found=other,
            remedy=REMEDY,
        )
    return last


class SealedCheckpoints(TrainerCallback):
    """A checkpoint counts once it is sealed; only then do the others go.

    One at the end of an epoch, or of the run, waits for the evaluation there, which a resumed run would not repeat.
    """

    def __init__(self, run: Mapping[str, Any]) -> None:
        self._run = run
        self._waits = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The state of a resumed run has those that it was begun with.
        state.save_steps = int(args.save_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert state.epoch is not None
        is_end = state.epoch.is_integer() or state.global_step >= state.max_steps
        self._waits = control.should_save and is_end
        control.should_save = control.should_save and not is_end

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save = control.should_save or self._waits

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert args.output_dir is not None
        checkpoints = _checkpoints(Path(args.output_dir))
        seal_checkpoint(checkpoints.pop(state.global_step), self._run)
        for other in checkpoints.values():
            shutil.rmtree(other, ignore_errors=True)


def _checkpoints(folder: Path) -> dict[int, Path]:
    """All that are there, sealed or not, by their steps."""
    # Not by a glob: it takes a folder that it cannot read for an empty one.
    paths = list(folder.iterdir()) if folder.exists() else []
    names = {path: re.fullmatch("checkpoint-([0-9]{1,15})", path.name) for path in paths}
    return {int(name[1]): path for path, name in names.items() if name}
