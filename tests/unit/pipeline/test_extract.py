"""What an extraction keeps in memory, and on the disk, before the teacher reads."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kvpipe.data.corpus import Corpus
from kvpipe.data.packed_tokens import PackedTokens
from kvpipe.data.sample import Sample
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline import extract as module
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig


def test_the_samples_are_let_go_before_the_teacher_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_teacher, alive = module.run_teacher, []

    def look(store: KVStore, *args: Any, **options: Any) -> Any:
        gc.collect()
        alive.append([found for found in gc.get_objects() if isinstance(found, Corpus | PackedTokens | Sample)])
        return run_teacher(store, *args, **options)

    monkeypatch.setattr(module, "run_teacher", look)
    before = len([found for found in gc.get_objects() if isinstance(found, Corpus | PackedTokens | Sample)])
    report = extract(ExtractConfig("qwen", tmp_path / "x.zarr", samples=20, eval_samples=4))
    assert report.store.num_samples == 28
    assert len(alive[0]) == before


def test_one_long_sample_does_not_make_the_others_long(tmp_path: Path) -> None:
    lines = [f'{{"prompt": "What is {i}?", "answer": "{i}"}}\n' for i in range(40)]
    (tmp_path / "some.jsonl").write_text("".join(lines) + '{"text": "' + 300 * "1 + " + '1"}\n')
    store = extract(ExtractConfig("qwen", tmp_path / "x.zarr", dataset=str(tmp_path / "some.jsonl"))).store
    assert store.shape[4] > 10 * store.length.mean()
    assert vars(store).keys().isdisjoint({"input_ids", "segment_ids"}), "the padded ones"
    assert store.input_id_rows.items.nbytes == 4 * store.length.sum()


def test_an_empty_folder_is_a_free_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But neither the one that the process stands in, which would be gone beneath its shell, nor a link, or a disk."""
    (tmp_path / "x.zarr").mkdir()
    config = ExtractConfig("qwen", tmp_path / "x.zarr", samples=20, eval_samples=4)
    for name, target in (("link", tmp_path / "x.zarr"), ("dangling", tmp_path / "nowhere")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(StoreError, match=f"{name} is taken: .* found a link to {target}"):
            extract(replace(config, store=tmp_path / name))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path == config.store)
        with pytest.raises(StoreError, match="is taken"):
            extract(config)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "x.zarr")
        with pytest.raises(StoreError, match="is taken"):
            extract(config)
    assert extract(config).store.complete


def test_all_of_a_store_is_flushed_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata, tokens and text, under the name that it has while it is made."""
    flushed, fsync = set(), os.fsync

    def look(descriptor: int) -> None:
        flushed.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    store = extract(ExtractConfig("qwen", tmp_path / "x.zarr", samples=20, eval_samples=4)).store
    beside = [path for path in store.path.rglob("*") if path.relative_to(store.path).parts[0] not in ("kv", "ledger")]
    names = {path.relative_to(store.path).as_posix() for path in beside}
    assert {"zarr.json", "input_ids/zarr.json", "text/c/0"} <= names
    assert {str(tmp_path / ".x.zarr.partial" / name) for name in names} <= flushed
    assert str(tmp_path) in flushed
