"""How the arrays of a store are cut, by their metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import zarr

from .codec import require_codec
from .layout import LOGICAL_DTYPES, KVGeometry
from .ledger import Ledger
from .manifest import Manifest
from .part import QUERIES, Part
from .shard import ShardLayout
from .side_arrays import open_array


@dataclass(frozen=True)
class StoreStructure:
    """`shape` is that of the KV, `[L, 2, B, H, T, D]`, decoded; `parts` and `layouts` those of every array with it."""

    shape: tuple[int, ...]
    geometry: KVGeometry
    parts: dict[str, Part]
    layouts: dict[str, ShardLayout]

    @classmethod
    def of(cls, group: zarr.Group, manifest: Manifest, *, evicts: bool) -> StoreStructure:
        """Raises KeyError, TypeError or ValueError for arrays that are not what `create_store` makes for a manifest."""
        kv, codec = open_array(group, "kv"), require_codec(manifest.codec)
        num_layers, _, num_samples, num_kv_heads, max_length, packed = kv.shape
        block, samples = kv.chunks[4], (kv.shards or kv.chunks)[2]
        if min(block, samples, *kv.shape) < 1 or max_length % block:
            raise ValueError(f"kv of {kv.shape} cannot be cut into {samples} samples of {block} tokens")
        if len(manifest.layers) != num_layers:
            raise ValueError(f"kv has {num_layers} layers, the manifest {len(manifest.layers)}")
        dtype, head_dim = LOGICAL_DTYPES[str(kv.attrs["logical_dtype"])], codec.head_dim(packed)
        query_heads = open_array(group, QUERIES).shape[2] if manifest.queries else 0
        geometry, blocks = KVGeometry(num_layers, num_kv_heads, head_dim, dtype, query_heads), max_length // block
        parts = codec.all_parts(geometry, block, evicts=evicts)
        for name, part in parts.items():
            _require_part(open_array(group, name), part, num_samples, samples, blocks)
        _require_ledger(open_array(group, "ledger"), num_samples, samples, blocks, len(parts))
        layouts = {name: part.layout(block, samples, blocks) for name, part in parts.items()}
        return cls((*kv.shape[:5], head_dim), geometry, parts, layouts)


def _require_part(array: zarr.Array[Any], part: Part, num_samples: int, samples: int, blocks: int) -> None:
    expected = (part.grid(num_samples, blocks), part.grid(samples, blocks), part.chunk, part.dtype)
    found = (array.shape, array.shards, array.chunks, array.dtype)
    if found != expected:
        raise ValueError(f"{array.name} has shape, shards, chunks and dtype {found} instead of {expected}")


def _require_ledger(array: zarr.Array[Any], num_samples: int, samples: int, blocks: int, parts: int) -> None:
    if (array.shape, array.chunks, array.dtype) != Ledger.array(num_samples, samples, blocks, parts):
        raise ValueError(f"the ledger of {array.shape} {array.dtype} is not one of {samples} samples a shard")
