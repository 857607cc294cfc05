"""What there is to say of a store, as JSON types."""

from __future__ import annotations

from typing import Any

from .layout import DIMENSION_NAMES, dtype_name
from .store import KVStore


def summarise(store: KVStore) -> dict[str, Any]:
    """What `kvpipe inspect` and every report show."""
    tokens = int(store.length.sum())
    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    finished = len(store.finished_shards())
    return {
        "path": str(store.path),
        "complete": finished == store.num_shards,
        "shards": {"finished": finished, "total": store.num_shards, "samples_per_shard": store.layout.samples},
        "shape": dict(zip(DIMENSION_NAMES, store.shape, strict=True)),
        "samples": {split: len(store.indices(split)) for split in store.split_names},
        "tokens": tokens,
        "tokens_kept": int(store.kv_length.sum()),
        "truncated_samples": store.truncated,
        "excluded_samples": len(store.excluded),
        "wrong_answers": store.wrong_answers,
        "dtype": dtype_name(store.dtype),
        "lossy": store.lossy,
        "kept_as": kept_as(store),
        "bytes_on_disk": size,
        "bytes_per_token": size / tokens,
        "raw_bytes_per_token_of_kv": store.geometry.bytes_per_token,
        "bytes_per_token_of_queries": store.geometry.query_bytes_per_token,
        "extraction": store.extraction,
        "kvpipe_version": store.kvpipe_version,
        "manifest": store.manifest.to_dict(),
    }


def kept_as(store: KVStore) -> str:
    """For people: the codec, how much was kept where it is not all, of the layers and, by which segments and policy, of
    the tokens, and whether there are queries."""
    manifest, said = store.manifest, [store.codec.name]
    if len(manifest.layers) < manifest.teacher.num_layers:
        said.append(f"{len(manifest.layers)} of {manifest.teacher.num_layers} layers")
    if store.evicts:
        share = store.kv_length.sum() / store.length.sum()
        chosen = [*manifest.segments, *([manifest.eviction] if manifest.budget is not None else [])]
        said.append(f"{share:.0%} of the tokens ({', '.join(chosen)})")
    if manifest.queries:
        said.append("with queries")
    return ", ".join(said)
