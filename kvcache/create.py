"""Lay out a new store: everything but the KV itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec

from .codec import require_codec
from .files import PARTIAL, flush, naming, remove_tree
from .integrity import metadata_checksums, seal
from .layout import KVGeometry, dtype_name
from .ledger import Ledger
from .manifest import Manifest
from .padded_rows import PaddedRows
from .part import QUERIES
from .shard import CRC_BYTES
from .side_arrays import add_array
from .signals import deferred_signals
from .store import ATTRIBUTE, KV_LENGTH, KVStore

TOKEN_BLOCK = 32
"""Tokens in a chunk: short samples cost their own length, rounded up to this."""


@dataclass(frozen=True)
class SampleTable:
    """What a store keeps beside the KV, for `B` samples.

    `text` are the samples as JSON objects (see `json_lines`); `split` `[B]` names each sample's split by its index in
    `split_names`. `input_ids` `[N]`, `segment_ids` `[N]` and `spans` `[N, 2]` (character offsets) are the tokens of all
    samples, end to end; `length` `[B]` counts them. `kv_length` `[B]` counts those whose KV is kept, where some are
    evicted.
    """

    text: bytearray
    split_names: tuple[str, ...]
    split: NDArray[np.int8]
    length: NDArray[np.int32]
    input_ids: NDArray[np.int32]
    segment_ids: NDArray[np.int8]
    spans: NDArray[np.int32]
    kv_length: NDArray[np.int32] | None = None

    @property
    def evicts(self) -> bool:
        return self.kv_length is not None

    @property
    def width(self) -> int:
        """Tokens of the longest sample, in whole blocks."""
        return -(-int(self.length.max()) // TOKEN_BLOCK) * TOKEN_BLOCK

    def stored_bytes(self, geometry: KVGeometry, codec: str, samples_per_shard: int) -> int:
        """What a store of it takes on disk: KV, queries if the geometry has any, shard indices and ledger to the byte;
        the rest, but for a tokenizer, before it is compressed."""
        lengths, num_samples = self.length if self.kv_length is None else self.kv_length, len(self.length)
        blocks, samples = self.width // TOKEN_BLOCK, min(samples_per_shard, num_samples)
        parts = require_codec(codec).all_parts(geometry, TOKEN_BLOCK, evicts=self.evicts).values()
        _, entry, dtype = Ledger.array(num_samples, samples, blocks, len(parts))
        layouts = [part.layout(TOKEN_BLOCK, samples, blocks) for part in parts]
        shard = sum(layout.index_bytes for layout in layouts) + math.prod(entry) * dtype.itemsize + CRC_BYTES
        chunks = _blocks(lengths) * sum(layout.record_bytes for layout in layouts)
        beside = self.length, self.split, self.input_ids, self.segment_ids, self.spans, self.kv_length
        rest = len(self.text) + sum(array.nbytes for array in beside if array is not None)
        return chunks + -(-num_samples // samples) * shard + rest


def json_lines(records: Iterable[Mapping[str, Any]]) -> bytearray:
    """JSON objects, one a line."""
    text = bytearray()
    for record in records:
        text += f"{json.dumps(record)}\n".encode()
    return text


def create_store(
    path: Path,
    manifest: Manifest,
    table: SampleTable,
    geometry: KVGeometry,
    *,
    tokenizer_files: Mapping[str, bytes],
    truncated: int,
    samples_per_shard: int,
    wrong_answers: int = 0,
) -> KVStore:
    """An empty store. It appears at `path` whole or not at all. `truncated` samples were cut, and of those that the
    teacher wrote the reasoning of it answered `wrong_answers` wrong.

    Raises ConfigError for a codec that is unknown or cannot hold this geometry.
    """
    # Interrupted, Zarr's own threads would go on writing, and make anew what is being removed.
    with deferred_signals(), naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_name(f".{path.name}{PARTIAL}")
        remove_tree(building)
        try:
            group = zarr.create_group(building, zarr_format=3)
            _create_kv(group, manifest, table, geometry, samples_per_shard)
            checksums = _create_side_arrays(group, table, tokenizer_files)
            group.attrs[ATTRIBUTE] = seal(
                {
                    "manifest": manifest.to_dict(),
                    "kvpipe_version": version("kvpipe"),
                    "split_names": list(table.split_names),
                    "truncated_samples": truncated,
                    "wrong_answers": wrong_answers,
                    "tokenizer_files": list(tokenizer_files),
                    "checksums": checksums,
                    "metadata": metadata_checksums(building),
                }
            )
            # On the disk before it is there: what it was made from, a teacher's reasoning say, may be deleted then.
            for entry in (building, *building.rglob("*")):
                flush(entry)
            building.rename(path)
            flush(path.parent)
        except BaseException:
            remove_tree(building)
            raise
    return KVStore.open(path)


def kv_bytes(lengths: NDArray[np.int32], geometry: KVGeometry, codec: str) -> int:
    """The KV alone of samples of these lengths, in whole token blocks, with their queries if the geometry has any."""
    parts = require_codec(codec).all_parts(geometry, TOKEN_BLOCK, evicts=False).values()
    return _blocks(lengths) * sum(part.layout(TOKEN_BLOCK, 1, 1).chunk_bytes for part in parts)


def _blocks(lengths: NDArray[np.int32]) -> int:
    """Token blocks of samples of these lengths."""
    return int((-(-lengths.astype(np.int64) // TOKEN_BLOCK)).sum())


def _create_kv(group: zarr.Group, manifest: Manifest, table: SampleTable, geometry: KVGeometry, samples: int) -> None:
    num_samples, blocks = len(table.length), table.width // TOKEN_BLOCK
    samples = min(samples, num_samples)
    plain = {"serializer": BytesCodec(endian="little"), "compressors": [Crc32cCodec()], "filters": None}
    parts = require_codec(manifest.codec).all_parts(geometry, TOKEN_BLOCK, evicts=table.evicts)
    for name, part in parts.items():
        group.create_array(
            name,
            shape=part.grid(num_samples, blocks),
            chunks=part.chunk,
            shards=part.grid(samples, blocks),
            dtype=part.dtype,
            fill_value=part.fill,
            dimension_names=part.axes,
            attributes={"logical_dtype": dtype_name(geometry.dtype)} if name in ("kv", QUERIES) else None,
            **plain,
        )
    shape, chunks, dtype = Ledger.array(num_samples, samples, blocks, len(parts))
    group.create_array(
        "ledger",
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=0,
        dimension_names=("sample", "entry"),
        **plain,
    )


def _create_side_arrays(group: zarr.Group, table: SampleTable, tokenizer_files: Mapping[str, bytes]) -> dict[str, int]:
    def padded(items: NDArray[Any], fill: int = 0) -> PaddedRows:
        return PaddedRows(items, table.length, table.width, fill)

    arrays: dict[str, tuple[NDArray[Any] | PaddedRows, tuple[str, ...]]] = {
        "length": (table.length, ("sample",)),
        "split": (table.split, ("sample",)),
        "input_ids": (padded(table.input_ids), ("sample", "token")),
        "segment_ids": (padded(table.segment_ids, fill=-1), ("sample", "token")),
        "spans": (padded(table.spans), ("sample", "token", "edge")),
        "text": (np.frombuffer(table.text, np.uint8), ("byte",)),
    }
    if table.kv_length is not None:
        arrays[KV_LENGTH] = table.kv_length, ("sample",)
    for name, content in tokenizer_files.items():
        arrays[f"tokenizer/{name}"] = np.frombuffer(content, np.uint8), ("byte",)
    return {name: add_array(group, name, data, axes) for name, (data, axes) in arrays.items()}
