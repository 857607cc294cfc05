"""Damage to any file that a run goes on from, or that its result rests on: refused, never trained on or reported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kvpipe.kvcache.errors import ConfigError
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.distill import distill
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.run_checkpoints import last_checkpoint
from kvpipe.pipeline.run_directory import RunDirectory, run_of

from .conftest import Tally
from .test_damage import KINDS, draw

CONFIG = DistillConfig(mode="flat", batch_size=8, max_steps=4, max_new_tokens=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    extract(ExtractConfig("qwen", folder / "x.zarr", samples=40, eval_samples=4, batch_size=8))
    distill(CONFIG, [folder / "x.zarr"], folder / "run", device="cpu")
    return folder / "run"


def require_whole(run: RunDirectory, identity: dict[str, object]) -> None:
    """What a resumed run, and a report, ask of a run directory."""
    run.require_free(identity, overwrite=False)
    record = run.read_record()
    if last_checkpoint(run.checkpoints, identity) is None or record is None:
        raise ConfigError("unfinished", remedy="The same command does it again")
    run.require_outputs(record)


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_to_a_run_goes_unseen(
    finished: Path, kind: str, tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    run = RunDirectory(Path(shutil.copytree(finished, tmp_path / "run")))
    record = run.read_record()
    assert record is not None
    identity = run_of(record)
    files = sorted(path for path in run.path.rglob("*") if path.is_file() and path.name != "config.json")
    rng, injected, detected = np.random.default_rng(0), 0, 0
    for _ in range(points(20, 200)):
        fault = draw(kind, files, rng)
        before = fault.strike()
        if any(not file.exists() or file.read_bytes() != data for file, data in before.items()):
            injected += 1
            try:
                require_whole(run, identity)
            except ConfigError:
                detected += 1
            else:
                # White space in a JSON document is the one thing that no checksum is of.
                assert run.read_record() == record, fault
                assert all(file.name in ("run.json", "checkpoint.json") for file in before), fault
                detected += 1
        for file, data in before.items():
            file.write_bytes(data)
    assert injected > 0
    assert detected == injected
    require_whole(run, identity)
    tally.add(f"run damaged: {kind}", tried=points(20, 200), injected=injected, detected=detected, lost=0)


def test_a_damaged_checkpoint_is_refused_and_without_it_the_run_starts_anew(finished: Path, tmp_path: Path) -> None:
    store, path = finished.parent / "x.zarr", tmp_path / "run"
    shutil.copytree(finished, path)
    run = RunDirectory(path)
    (path / "run.json").unlink()
    (checkpoint,) = run.checkpoints.iterdir()
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ConfigError, match=r"model\.safetensors fails its checksum\. Delete it: .* starts the run anew"):
        distill(CONFIG, [store], path, device="cpu")
    shutil.rmtree(checkpoint)
    record = distill(CONFIG, [store], path, device="cpu")
    assert record["resumed_from"] is None
    for name in ("student/model.safetensors", "predictions.jsonl"):
        assert (path / name).read_bytes() == (finished / name).read_bytes()
