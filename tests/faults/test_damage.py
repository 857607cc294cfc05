"""Damage to any file of a store: noticed by `verify`, and never read as if it were good."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.verify import require_side_arrays, verify_shards
from torch import Tensor

from .conftest import Tally

LENGTHS = [5, 40, 33, 2, 64, 32, 1, 70, 20, 31, 8, 45]
KINDS = ("bit flip", "truncation", "deletion", "swap", "zeroed range")
TOKENIZER = {"tokenizer.json": b'{"a": 1}', "vocabulary.bin": bytes(range(64)), "merges.bin": bytes(range(64))[::-1]}


@dataclass(frozen=True)
class Fault:
    """One change to the files of a store."""

    kind: str
    files: tuple[Path, ...]
    contents: tuple[bytes | None, ...]

    def strike(self) -> dict[Path, bytes]:
        """Change the files; returns what they were."""
        before = {file: file.read_bytes() for file in self.files}
        for file, content in zip(self.files, self.contents, strict=True):
            file.unlink() if content is None else file.write_bytes(content)
        return before


def draw(kind: str, files: list[Path], rng: np.random.Generator) -> Fault:
    """A fault of a kind, in a file drawn from all."""
    file = files[rng.integers(len(files))]
    data = file.read_bytes()
    if kind == "deletion":
        return Fault(kind, (file,), (None,))
    if kind == "truncation":
        return Fault(kind, (file,), (data[: rng.integers(len(data))],))
    if kind == "swap":
        alike = [other for other in files if other != file and other.stat().st_size == len(data)]
        other = (alike or files)[rng.integers(len(alike or files))]
        return Fault(kind, (file, other), (other.read_bytes(), data))
    changed = bytearray(data)
    if kind == "bit flip":
        changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    else:
        start, size = rng.integers(len(data)), rng.integers(1, 64)
        changed[start : start + size] = bytes(len(changed[start : start + size]))
    return Fault(kind, (file,), (bytes(changed),))


def read_everything(store: KVStore) -> list[Any]:
    """All that a training run could see of a store."""
    reader, samples = KVReader(store), range(len(LENGTHS))
    return [
        reader.read(samples, 96),
        reader.read_queries(samples).float().numpy().tobytes() if store.manifest.queries else b"",
        *(store.read_side_array(name).tobytes() for name in store.side_arrays),
        store.records,
        store.tokenizer_files(),
        [store.indices(split).tolist() for split in store.split_names],
        store.truncated,
        store.manifest,
    ]


def same(found: list[Any], expected: list[Any]) -> bool:
    return torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


def damaged_shards(path: Path) -> set[int] | None:
    """The shards that `verify` names; None where it stops at something that is not a shard."""
    try:
        store = KVStore.open(path)
        require_side_arrays(store)
    except StoreError:
        return None
    return {damage.shard for damage in verify_shards(store) if damage is not None}


def shard_of(file: Path, store: KVStore) -> set[int]:
    """The shard that a file of KV belongs to."""
    return {shard for shard in range(store.num_shards) if file in store.shard_paths(shard)}


@pytest.mark.parametrize(("codec", "query_heads"), [("raw", 0), ("int4", 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_noticed_and_none_is_read(
    make_store: Callable[..., tuple[KVStore, Tensor]],
    kind: str,
    codec: str,
    query_heads: int,
    points: Callable[[int, int], int],
    tally: Tally,
) -> None:
    kept = {"codec": codec, "query_heads": query_heads}
    store, kv = make_store(LENGTHS, samples_per_shard=3, tokenizer_files=TOKENIZER, **kept)
    expected = read_everything(store)
    assert codec != "raw" or torch.equal(expected[0], kv)
    folders = (*(f"{name}/c" for name in store.parts), "ledger/c", "")
    # Shards, ledger entries and all the rest get an equal share.
    groups = [[file for file in sorted((store.path / folder).rglob("*")) if file.is_file()] for folder in folders]
    rng = np.random.default_rng(KINDS.index(kind))
    tried, injected, detected, lost = points(8, 300), 0, 0, 0
    for number in range(tried):
        fault = draw(kind, groups[number % len(groups)], rng)
        before = fault.strike()
        if all(file.exists() and file.read_bytes() == content for file, content in before.items()):
            continue
        injected += 1
        named = damaged_shards(store.path)
        assert named is None or named, fault.files
        detected += 1
        struck = set[int]().union(*(shard_of(file, store) for file in fault.files))
        assert named is None or struck <= named, fault.files
        with suppress(StoreError):
            lost += not same(read_everything(KVStore.open(store.path)), expected)
        assert lost == 0, fault.files
        for file, content in before.items():
            file.write_bytes(content)
    assert same(read_everything(KVStore.open(store.path)), expected)
    tally.add(kind, tried=tried, injected=injected, detected=detected, lost=lost)
