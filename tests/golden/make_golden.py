"""Write the golden stores again, a raw and a lossy one: `python tests/golden/make_golden.py`.

The files beside this one fix the format on disk. From the first release on, a change in them needs a new schema
version, and readers of the old one; before it, the format is still being made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from kvpipe.kvcache.create import SampleTable, create_store, json_lines
from kvpipe.kvcache.layout import KVGeometry, take_tokens
from kvpipe.kvcache.manifest import SCHEMA_VERSION, DatasetIdentity, Manifest, TeacherIdentity
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.writer import ShardWriter
from torch import Tensor

FOLDER = Path(__file__).parent
STORES = {"store.zarr": False, "lossy.zarr": True}
LENGTHS, KEPT = [5, 64, 33], [3, 32, 17]
LAYERS, HEADS, QUERY_HEADS, HEAD_DIM, TOKENS = 2, 2, 4, 4, 64
RECORDS = [
    {"id": "golden/0", "prompt": "Tom has 3.", "reasoning": "3+4=7.", "answer": "7"},
    {"id": "golden/1", "prompt": "naïve \U0001f98a\u2028 text", "reasoning": "", "answer": ""},
    {"id": "golden/2", "prompt": "half a pair: \ud83e", "reasoning": "r", "answer": "a"},
]
TOKENIZER_FILES = {"tokenizer.json": b'{"model": null}\n', "vocab.bin": bytes(range(8))}


def golden_kv() -> Tensor:
    """`[L, 2, B, H, T, D]`: eighths between -16 and 16 that bfloat16 holds exactly, a different run everywhere."""
    shape = (LAYERS, 2, len(LENGTHS), HEADS, TOKENS, HEAD_DIM)
    kv = (torch.arange(np.prod(shape)).reshape(shape) * 37 % 251 - 125).float() / 8
    for sample, length in enumerate(LENGTHS):
        kv[:, :, sample, :, length:] = 0
    return kv.bfloat16()


def golden_queries() -> Tensor:
    """`[L, B, Hq, T, D]`: quarters between -8 and 8, a different run everywhere."""
    shape = (LAYERS, len(LENGTHS), QUERY_HEADS, TOKENS, HEAD_DIM)
    return ((torch.arange(np.prod(shape)).reshape(shape) * 11 % 65 - 32).float() / 4).bfloat16()


def write_golden_store(path: Path, *, lossy: bool = False) -> KVStore:
    """A golden store at `path`: all of the KV, or `int4` of the first half of every sample with its queries. The bytes
    of these and of the ledger are the same on every machine."""
    real = np.arange(TOKENS)[None] < np.array(LENGTHS)[:, None]
    tokens = np.arange(len(LENGTHS) * TOKENS).reshape(len(LENGTHS), TOKENS)[real]
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        teacher=TeacherIdentity("golden", "main", 2, "0" * 64, "1" * 64),
        tokenizer_hash="2" * 64,
        dataset=DatasetIdentity("golden", len(LENGTHS), "3" * 64),
        reasoning="dataset",
        dtype="bfloat16",
        codec="int4" if lossy else "raw",
        layers=(0, 1),
        segments=("prompt", "reasoning", "answer"),
        eviction="right-crop" if lossy else "none",
        budget=0.5 if lossy else None,
        queries=lossy,
        key_position="post-rope",
        rope={"rope_type": "default", "rope_theta": 10000.0},
        max_tokens=TOKENS,
        seed=0,
    )
    table = SampleTable(
        text=json_lines(RECORDS),
        split_names=("train", "test"),
        split=np.array([0, 0, 1], np.int8),
        length=np.array(LENGTHS, np.int32),
        input_ids=(tokens % 97 + 1).astype(np.int32),
        segment_ids=(tokens % 3).astype(np.int8),
        spans=np.stack([tokens, tokens + 1], axis=1).astype(np.int32),
        kv_length=np.array(KEPT, np.int32) if lossy else None,
    )
    geometry = KVGeometry(LAYERS, HEADS, HEAD_DIM, torch.bfloat16, QUERY_HEADS if lossy else 0)
    store = create_store(
        path, manifest, table, geometry, tokenizer_files=TOKENIZER_FILES, truncated=1, samples_per_shard=2
    )
    kv = golden_kv()
    with ShardWriter(store, range(store.num_shards)) as writer:
        pairs, positions, queries = [(key, value) for key, value in kv], None, None
        if lossy:
            positions = torch.stack([F.pad(torch.arange(kept), (0, max(KEPT) - kept), value=-1) for kept in KEPT])
            pairs = [(take_tokens(key, positions), take_tokens(value, positions)) for key, value in pairs]
            queries = [take_tokens(query, positions) for query in golden_queries()]
        writer.put(range(len(LENGTHS)), pairs, positions, queries=queries)
    return store


def sha256(tensor: Tensor) -> str:
    """Of the bits of bfloat16 numbers."""
    bits = tensor.contiguous().view(torch.uint16).numpy()
    return hashlib.sha256(bits.astype("<u2").tobytes()).hexdigest()


def describe(store: KVStore) -> dict[str, Any]:
    """What `expected.json` says of the store."""
    names = (*store.parts, "ledger")
    files = sorted(path for name in names for path in (store.path / name / "c").rglob("0") if path.is_file())
    reader, samples = KVReader(store), range(len(LENGTHS))
    return {
        "shape": list(store.shape),
        "kv_sha256": sha256(reader.read(samples, TOKENS)),
        **({"queries_sha256": sha256(reader.read_queries(samples, TOKENS))} if store.manifest.queries else {}),
        "manifest_hash": store.manifest.hash,
        "files": {
            path.relative_to(store.path).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        },
    }


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    description = {}
    for name, is_lossy in STORES.items():
        shutil.rmtree(target / name, ignore_errors=True)
        description[name] = describe(write_golden_store(target / name, lossy=is_lossy))
    (target / "expected.json").write_text(json.dumps(description, indent=2) + "\n")
