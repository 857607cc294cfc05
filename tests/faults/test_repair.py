"""`kvpipe repair` writes exactly the damaged shards anew, and the bytes are those that were lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kvpipe.kvcache.errors import ConfigError, StoreError
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.verify import verify_shards
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.models import builtin_teachers
from kvpipe.pipeline.repair import repair
from safetensors.torch import load_file, save_file

from .conftest import EXTRACT, Commands, Tally, contents


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "x.zarr"
    extract(ExtractConfig("qwen", path, samples=60, eval_samples=4, batch_size=8, max_shard_bytes=400_000))
    return path


def damage(store: KVStore, shard: int, kind: int, rng: np.random.Generator) -> None:
    """A flipped bit, a shard cut short, a lost shard, a lost ledger entry, a folder in the place of either, in turn."""
    file = store.shard_path(shard) if kind in (0, 1, 2, 4) else store.ledger.path(shard)
    data = bytearray(file.read_bytes())
    if kind == 0:
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    if kind < 2:
        file.write_bytes(data[: len(data) if kind == 0 else int(rng.integers(len(data)))])
    else:
        file.unlink()
    if kind > 3:
        (file / "inner").mkdir(parents=True)


def files(store: Path) -> dict[str, tuple[bytes, int]]:
    found = (file for file in sorted(store.rglob("*")) if file.is_file() and file != store / "zarr.json")
    return {str(file.relative_to(store)): (file.read_bytes(), file.stat().st_mtime_ns) for file in found}


def test_only_damaged_shards_are_written_and_they_are_what_they_were(
    whole: Path, tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    rng, mended = np.random.default_rng(0), 0
    for number in range(points(2, 25)):
        path = tmp_path / str(number) / "x.zarr"
        shutil.copytree(whole, path)
        before = files(path)
        store = KVStore.open(path)
        struck = sorted(rng.choice(store.num_shards, size=3, replace=False).tolist())
        for shard in struck:
            damage(store, shard, int(rng.integers(6)), rng)
        assert sorted(found.shard for found in repair(path)) == struck
        after = files(path)
        assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
        rewritten = {name for name in after if after[name][1] != before[name][1]}
        assert rewritten <= {name for shard in struck for name in (f"kv/c/0/0/{shard}/0/0/0", f"ledger/c/{shard}/0")}
        assert not any(verify_shards(KVStore.open(path)))
        assert repair(path) == []
        mended += len(struck)
    tally.add("shards repaired", tried=mended, injected=mended, detected=mended, lost=0)


def test_another_teacher_is_refused_and_what_was_sound_stays(whole: Path, tmp_path: Path) -> None:
    """One weight differs, in its last bit."""
    shutil.copytree(builtin_teachers()["qwen"], tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    name = min(weights)
    weights[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "x.zarr"
    shutil.copytree(whole, path)
    store = KVStore.open(path)
    damage(store, 1, 2, np.random.default_rng(0))
    before = files(path)
    with pytest.raises(StoreError, match=r"another teacher \(teacher\.weights_hash differs\): expected .*, found"):
        repair(path, model=str(tmp_path / "other"))
    assert files(path) == before


def test_damage_beside_the_kv_cannot_be_mended(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    shutil.copytree(whole, path)
    (path / "length" / "c" / "0").unlink()
    with pytest.raises(StoreError, match=r"length in .* is damaged.*Extract again into a new place"):
        repair(path)


def test_a_teacher_that_is_not_built_in_has_to_be_named(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(builtin_teachers()["qwen"], tmp_path / "mine")
    path = tmp_path / "x.zarr"
    config = ExtractConfig(str(tmp_path / "mine"), path, samples=20, eval_samples=4, max_shard_bytes=400_000)
    extract(config)
    damage(KVStore.open(path), 0, 2, np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"expected the folder or Hub id of mine, found none\. Name it with --model"):
        repair(path)
    assert [found.shard for found in repair(path, model=config.model)] == [0]


def test_an_extraction_that_was_killed_is_repaired_with_its_own_batches(
    commands: Commands, tmp_path: Path, tally: Tally
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    events = commands.finish(EXTRACT, tmp_path / "whole")["events"]
    assert commands.run(EXTRACT, tmp_path / "killed", kill_at_event=events * 2 // 3)["code"] == -9
    written = len(repair(tmp_path / "killed" / "x.zarr"))
    assert written > 0
    left_out = {"x.zarr/zarr.json", ".x.zarr.lock"}
    assert contents(tmp_path / "killed", left_out) == contents(tmp_path / "whole", left_out)
    tally.add("shards repaired", tried=written, injected=written, detected=written, lost=0)
