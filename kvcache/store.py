"""The store: one Zarr v3 group with the KV, its ledger, the tokens, the text and the tokenizer."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from .errors import StoreError
from .files import write_atomic
from .integrity import is_metadata, require_metadata, require_seal, seal
from .layout import DIMENSION_NAMES, LOGICAL_DTYPES, STORAGE_DTYPES, KVGeometry, dtype_name
from .manifest import Manifest
from .shard import CRC_BYTES, EMPTY, ShardLayout, crc32c, read_index
from .side_arrays import open_array, read_array

ATTRIBUTE = "kvpipe"


class KVStore:
    """An open store. Its arrays are plain Zarr; `docs/storage.md` describes them."""

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self.group = group
        attributes = group.attrs[ATTRIBUTE]
        require_seal(attributes)
        self._checksums: dict[str, int] = dict(attributes["checksums"])
        require_metadata(path, self._checksums)
        self.manifest = Manifest.from_dict(attributes["manifest"])
        self.kvpipe_version: str = attributes["kvpipe_version"]
        self.truncated: int = attributes["truncated_samples"]
        self.split_names: tuple[str, ...] = tuple(map(str, attributes["split_names"]))
        self._tokenizer_names: list[str] = list(map(str, attributes["tokenizer_files"]))
        kv = open_array(group, "kv")
        self.shape = kv.shape
        self.dtype = LOGICAL_DTYPES[str(kv.attrs["logical_dtype"])]
        num_layers, _, self.num_samples, num_kv_heads, max_length, head_dim = kv.shape
        self.geometry = KVGeometry(num_layers, num_kv_heads, head_dim, self.dtype)
        if not kv.shards or 0 in kv.shards or kv.dtype != STORAGE_DTYPES[self.dtype]:
            raise ValueError(f"kv is not a sharded array of {attributes['manifest']['dtype']}")
        self.layout = ShardLayout(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block=kv.chunks[4],
            samples=kv.shards[2],
            blocks=max_length // kv.chunks[4],
            dtype=np.dtype(kv.dtype).newbyteorder("<"),
        )

    # ------------------------------------------------------------------ opening

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> KVStore:
        """Open a store for reading. Raises StoreError where there is none, or only half of one."""
        path = Path(path)
        if not (path / "zarr.json").is_file():
            raise StoreError(
                f"no KV store at {path}",
                expected="a Zarr group written by kvpipe",
                found=_what_is_at(path),
                remedy="Name another, or write one with `kvpipe extract`",
            )
        try:
            # Consolidated metadata would stand in for the checked files.
            return cls(path, zarr.open_group(path, mode="r", use_consolidated=False))
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(
                f"{path} is not a KV store, or its metadata is damaged ({type(error).__name__}: {error})",
                remedy="Extract again into a new place",
            ) from error

    # ------------------------------------------------------------------ provenance

    def add_extraction(self, seconds: float, tokens: int, device: str, batch_size: int | None) -> None:
        """Note what a (perhaps resumed) extraction cost; not part of the store's identity."""
        group = zarr.open_group(self.path, mode="r+")
        extraction = {
            "seconds": self.extraction["seconds"] + seconds,
            "tokens": self.extraction["tokens"] + tokens,
            "device": device,
            "batch_size": batch_size,
        }
        group.attrs[ATTRIBUTE] = seal({**group.attrs[ATTRIBUTE], "extraction": extraction})
        self.group = group

    @property
    def extraction(self) -> dict[str, Any]:
        """Seconds and tokens the teacher took for this store, over all resumed runs; its last device and batch size."""
        nothing = {"seconds": 0.0, "tokens": 0, "device": "", "batch_size": None}
        return self.group.attrs[ATTRIBUTE].get("extraction", nothing)

    # ------------------------------------------------------------------ what is in it

    @property
    def side_arrays(self) -> list[str]:
        """Names of all arrays but the KV and its ledger."""
        return [name for name in self._checksums if not is_metadata(name)]

    def read_side_array(self, name: str, rows: int | None = None) -> NDArray[Any]:
        """A whole array. Raises StoreError where it is missing, damaged or of another number of `rows`."""
        return read_array(self.group, name, self._checksums[name], rows)

    @cached_property
    def length(self) -> NDArray[np.int32]:
        """Tokens of every sample `[B]`."""
        length = self.read_side_array("length", self.num_samples)
        if length.dtype != np.int32 or length.min() < 1 or length.max() > self.shape[4]:
            raise StoreError(
                f"{self.path} holds samples of impossible lengths",
                expected=f"int32 from 1 to {self.shape[4]}",
                found=f"{length.dtype} from {length.min()} to {length.max()}",
                remedy="Extract again into a new place",
            )
        return length

    @cached_property
    def input_ids(self) -> NDArray[np.int32]:
        """Token ids `[B, T]`, zeros past a sample's length."""
        return np.asarray(self.read_side_array("input_ids", self.num_samples), dtype=np.int32)

    @cached_property
    def segment_ids(self) -> NDArray[np.int8]:
        """Segment of every token `[B, T]`, -1 past a sample's length."""
        return np.asarray(self.read_side_array("segment_ids", self.num_samples), dtype=np.int8)

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The samples as they were read: id, prompt, reasoning, answer."""
        text = np.asarray(self.read_side_array("text"), dtype=np.uint8).tobytes()
        try:
            records = [json.loads(line) for line in text.splitlines()]
            if len(records) != self.num_samples or not all(map(_is_record, records)):
                raise ValueError("samples without id, prompt, reasoning and answer")
        except (ValueError, RecursionError) as error:
            raise StoreError(
                f"the text in {self.path} is damaged",
                expected=f"{self.num_samples} samples",
                found=error,
                remedy="Extract again into a new place",
            ) from error
        return records

    @cached_property
    def excluded(self) -> NDArray[np.int64]:
        """Positions of samples that have no KV, for the teacher's was not finite: the ledger holds 0 for all their
        chunks. Of finished shards."""
        found = []
        for shard in sorted(self.finished_shards()):
            samples, checksums = self.shard_samples(shard), self.shard_checksums(shard)
            rows = np.flatnonzero(~checksums[: len(samples)].any(axis=1))
            if len(rows):
                self._require_left_out(shard, rows)
            found += [samples[row] for row in rows]
        return np.array(found, dtype=np.int64)

    def _require_left_out(self, shard: int, rows: NDArray[np.intp]) -> None:
        """Raise StoreError where a shard holds a sample that its ledger entry, then another shard's, leaves out."""
        try:
            index = read_index(np.fromfile(self.shard_path(shard), np.uint8), self.layout)
        except ValueError as error:
            raise self._damaged_entry(shard) from error
        if (index[rows] != EMPTY).any():
            raise self._damaged_entry(shard)

    def indices(self, split: str) -> NDArray[np.int64]:
        """Positions of a split's samples, without the excluded ones. Raises StoreError for an unknown split."""
        if split not in self.split_names:
            raise StoreError(
                f"{self.path} has no such split",
                expected=" or ".join(self.split_names),
                found=split,
                remedy="Name a split that is in the store",
            )
        split_ids = self.read_side_array("split", self.num_samples)
        positions = np.flatnonzero(split_ids == self.split_names.index(split))
        return positions[~np.isin(positions, self.excluded)]

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files, by name: enough to rebuild it without the teacher."""
        return {name: self.read_side_array(f"tokenizer/{name}").tobytes() for name in self._tokenizer_names}

    def summary(self) -> dict[str, Any]:
        """What `kvpipe inspect` shows, as JSON types."""
        tokens = int(self.length.sum())
        size = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        finished = len(self.finished_shards())
        return {
            "path": str(self.path),
            "complete": finished == self.num_shards,
            "shards": {"finished": finished, "total": self.num_shards, "samples_per_shard": self.layout.samples},
            "shape": dict(zip(DIMENSION_NAMES, self.shape, strict=True)),
            "samples": {split: len(self.indices(split)) for split in self.split_names},
            "tokens": tokens,
            "truncated_samples": self.truncated,
            "excluded_samples": len(self.excluded),
            "dtype": dtype_name(self.dtype),
            "bytes_on_disk": size,
            "bytes_per_token": size / tokens,
            "bytes_per_token_of_kv": self.geometry.bytes_per_token,
            "extraction": self.extraction,
            "kvpipe_version": self.kvpipe_version,
            "manifest": self.manifest.to_dict(),
        }

    # ------------------------------------------------------------------ shards and ledger

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.layout.samples)

    def shard_path(self, shard: int) -> Path:
        return self.path / "kv" / "c" / "0" / "0" / str(shard) / "0" / "0" / "0"

    def shard_samples(self, shard: int) -> range:
        """Positions of the samples in a shard."""
        start = shard * self.layout.samples
        return range(start, min(start + self.layout.samples, self.num_samples))

    def ledger_path(self, shard: int) -> Path:
        return self.path / "ledger" / "c" / str(shard) / "0"

    def record_shard(self, shard: int, checksums: NDArray[np.uint32]) -> None:
        """Enter a finished shard into the ledger: only now does it count."""
        data = checksums.astype("<u4").reshape(-1).view(np.uint8)
        write_atomic(self.ledger_path(shard), data.tobytes() + crc32c(data).to_bytes(CRC_BYTES, "little"))

    def shard_checksums(self, shard: int) -> NDArray[np.uint32]:
        """Checksums `[samples, blocks]` of a shard's chunks. Raises StoreError for an unfinished shard."""
        checksums = self._ledger_entry(shard)
        if checksums is None:
            raise self._damaged_entry(shard)
        return checksums

    def _damaged_entry(self, shard: int) -> StoreError:
        return StoreError(
            f"shard {shard} of {self.path} is not in the ledger, or its entry is damaged",
            expected=f"valid checksums at {self.ledger_path(shard)}",
            found="none",
            remedy="Run the same `kvpipe extract` again: it writes the missing shards",
        )

    def _ledger_entry(self, shard: int) -> NDArray[np.uint32] | None:
        """The checksums of a shard; None where there are none, or those of another shard."""
        path, size = self.ledger_path(shard), self.layout.samples * self.layout.blocks * 4
        if not path.is_file() or path.stat().st_size != size + CRC_BYTES:
            return None
        data = np.fromfile(path, np.uint8)
        if crc32c(data[:size]).to_bytes(4, "little") != data[size:].tobytes():
            return None
        checksums = data[:size].view("<u4").reshape(self.layout.samples, self.layout.blocks)
        samples = self.shard_samples(shard)
        own = np.zeros(self.layout.samples, np.int64)
        own[: len(samples)] = -(-self.length[samples.start : samples.stop] // self.layout.block)
        found = (checksums != 0).sum(axis=1)
        # All chunks of a sample are there, or, where it was excluded, none.
        return checksums if np.all((found == own) | (found == 0)) else None

    def finished_shards(self) -> set[int]:
        """Shards that are whole, by the ledger. An array cannot tell: Zarr reads missing chunks as zeros."""
        return {
            shard
            for shard in range(self.num_shards)
            if self.shard_path(shard).is_file() and self._ledger_entry(shard) is not None
        }

    @property
    def complete(self) -> bool:
        return len(self.finished_shards()) == self.num_shards

    def require_complete(self) -> None:
        """Raise StoreError unless every shard is in the ledger."""
        finished = len(self.finished_shards())
        if finished != self.num_shards:
            raise StoreError(
                f"{self.path} is incomplete",
                expected=f"{self.num_shards} shards",
                found=finished,
                remedy="Run the same `kvpipe extract` again: it goes on where it stopped",
            )


def _is_record(record: Any) -> bool:
    names = ("id", "prompt", "reasoning", "answer")
    return isinstance(record, dict) and all(isinstance(record.get(name), str) for name in names)


def _what_is_at(path: Path) -> str:
    if path.is_dir():
        return "a folder without zarr.json"
    return "a file" if path.exists() else "nothing"
