"""The store: one Zarr v3 group with the KV, its ledger, the tokens, the text and the tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from .codec import CODECS, require_codec
from .errors import KVPipeError, StoreError
from .evict import NONE, POLICIES
from .files import flush, naming
from .integrity import require_files, require_seal, seal
from .ledger import Ledger
from .manifest import Manifest, require_schema
from .padded_rows import PaddedRows
from .side_arrays import read_array, read_rows
from .structure import StoreStructure

ATTRIBUTE = "kvpipe"
KV_LENGTH = "kv_length"


class KVStore:
    """An open store. Its arrays are plain Zarr; `docs/storage.md` describes them."""

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self.group = group
        attributes = group.attrs[ATTRIBUTE]
        # First: another version may be sealed in another way.
        require_schema(attributes["manifest"], str(path))
        require_seal(attributes)
        self._checksums: dict[str, int] = dict(attributes["checksums"])
        require_files(path, attributes["metadata"])
        self.manifest = Manifest.from_dict(attributes["manifest"])
        self.kvpipe_version: str = attributes["kvpipe_version"]
        self.truncated: int = attributes["truncated_samples"]
        self.wrong_answers: int = attributes["wrong_answers"]
        self.split_names: tuple[str, ...] = tuple(map(str, attributes["split_names"]))
        self._tokenizer_names: list[str] = list(map(str, attributes["tokenizer_files"]))
        _require_known(path, "codec", self.manifest.codec, CODECS)
        _require_known(path, "eviction policy", self.manifest.eviction, (NONE, *POLICIES))
        self.codec = require_codec(self.manifest.codec)
        structure = StoreStructure.of(group, self.manifest, evicts=self.evicts)
        self.shape, self.geometry = structure.shape, structure.geometry
        self.parts, self.layouts = structure.parts, structure.layouts
        self.num_samples, self.dtype, self.layout = self.shape[2], self.geometry.dtype, self.layouts["kv"]

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
            return cls(path, zarr.open_group(path, mode="r", zarr_format=3, use_consolidated=False))
        except KVPipeError:
            raise
        except Exception as error:
            raise StoreError(
                f"{path} is not a KV store, or its metadata is damaged ({type(error).__name__}: {error})",
                remedy="Extract again into a new place",
            ) from error

    # ------------------------------------------------------------------ provenance

    def add_extraction(self, seconds: float, tokens: int, device: str, batch_size: int | None) -> None:
        """Note what a (perhaps resumed) extraction cost; not part of the store's identity."""
        group = zarr.open_group(self.path, mode="r+", zarr_format=3, use_consolidated=False)
        extraction = {
            "seconds": self.extraction["seconds"] + seconds,
            "tokens": self.extraction["tokens"] + tokens,
            "device": device,
            "batch_size": batch_size,
        }
        with naming(self.path):
            group.attrs[ATTRIBUTE] = seal({**group.attrs[ATTRIBUTE], "extraction": extraction})
            flush(self.path / "zarr.json")
        self.group = group

    @property
    def extraction(self) -> dict[str, Any]:
        """Seconds and tokens the teacher took for this store, over all resumed runs; its last device and batch size."""
        nothing = {"seconds": 0.0, "tokens": 0, "device": "", "batch_size": None}
        return self.group.attrs[ATTRIBUTE].get("extraction", nothing)

    # ------------------------------------------------------------------ what is in it

    @property
    def evicts(self) -> bool:
        """Whether only some of a sample's tokens have KV here; `kv_position` says where they were."""
        return KV_LENGTH in self._checksums

    @property
    def lossy(self) -> bool:
        """Whether anything of the KV of the layers that are kept is lost."""
        return self.codec.lossy or self.evicts

    @property
    def side_arrays(self) -> list[str]:
        """Names of all arrays but those of the KV and its ledger."""
        return list(self._checksums)

    def read_side_array(self, name: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """A whole array. Raises StoreError where it is missing, damaged or of another `shape`."""
        return read_array(self.group, name, self._checksums[name], shape)

    @cached_property
    def length(self) -> NDArray[np.int32]:
        """Tokens of every sample `[B]`."""
        return self._lengths("length", 1, self.shape[4])

    @cached_property
    def kv_length(self) -> NDArray[np.int32]:
        """Tokens of every sample whose KV is kept `[B]`: all of them, but where some were evicted."""
        return self._lengths(KV_LENGTH, 0, self.length) if self.evicts else self.length

    def _lengths(self, name: str, least: int, most: int | NDArray[np.int32]) -> NDArray[np.int32]:
        lengths = self.read_side_array(name, (self.num_samples,))
        if lengths.dtype != np.int32 or (lengths < least).any() or (lengths > most).any():
            raise StoreError(
                f"{self.path} holds samples of an impossible {name}",
                expected=f"int32 from {least} to {np.max(most)}",
                found=f"{lengths.dtype} from {lengths.min()} to {lengths.max()}",
                remedy="Extract again into a new place",
            )
        return lengths

    @cached_property
    def input_ids(self) -> NDArray[np.int32]:
        """Token ids `[B, T]`, zeros past a sample's length."""
        return np.asarray(self.read_side_array("input_ids", self.shape[2::2]), dtype=np.int32)

    @cached_property
    def segment_ids(self) -> NDArray[np.int8]:
        """Segment of every token `[B, T]`, -1 past a sample's length."""
        return np.asarray(self.read_side_array("segment_ids", self.shape[2::2]), dtype=np.int8)

    @cached_property
    def input_id_rows(self) -> PaddedRows:
        """`input_ids` without their padding in memory."""
        return self._rows("input_ids")

    @cached_property
    def segment_id_rows(self) -> PaddedRows:
        """`segment_ids` without their padding in memory."""
        return self._rows("segment_ids", fill=-1)

    def _rows(self, name: str, fill: int = 0) -> PaddedRows:
        return read_rows(self.group, name, self._checksums[name], self.length, self.shape[4], fill)

    @cached_property
    def spans(self) -> NDArray[np.int32]:
        """The half-open range of characters of every token `[B, T, 2]`."""
        return np.asarray(self.read_side_array("spans", (*self.shape[2::2], 2)), dtype=np.int32)

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

    @property
    def with_kv(self) -> NDArray[np.int64]:
        """Positions of the samples that are not excluded."""
        return np.setdiff1d(np.arange(self.num_samples), self.excluded)

    @cached_property
    def excluded(self) -> NDArray[np.int64]:
        """Positions of samples that have no KV: the teacher's was not finite, or all tokens were evicted. Of finished
        shards."""
        return self._excluded(self._entries())

    def _excluded(self, entries: Mapping[int, NDArray[np.int64]]) -> NDArray[np.int64]:
        numbers = np.concatenate([np.empty(0, np.int64), *(entries[shard] for shard in sorted(entries))])
        return -numbers[numbers < 0] - 1

    def indices(self, split: str) -> NDArray[np.int64]:
        """Positions of a split's samples, without the excluded ones. Raises StoreError for an unknown split."""
        if split not in self.split_names:
            raise StoreError(
                f"{self.path} has no such split",
                expected=" or ".join(self.split_names),
                found=split,
                remedy="Name a split that is in the store",
            )
        split_ids = self.read_side_array("split", (self.num_samples,))
        positions = np.flatnonzero(split_ids == self.split_names.index(split))
        return positions[~np.isin(positions, self.excluded)]

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files, by name: enough to rebuild it without the teacher."""
        return {name: self.read_side_array(f"tokenizer/{name}").tobytes() for name in self._tokenizer_names}

    # ------------------------------------------------------------------ shards and ledger

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.layout.samples)

    def shard_path(self, shard: int) -> Path:
        """The file of a shard in the array `kv`."""
        return self.shard_paths(shard)[0]

    def shard_paths(self, shard: int) -> list[Path]:
        """The files of a shard, one a part."""
        return [part.shard_path(self.path / name, shard) for name, part in self.parts.items()]

    def shard_samples(self, shard: int) -> range:
        """Positions of the samples in a shard."""
        start = shard * self.layout.samples
        return range(start, min(start + self.layout.samples, self.num_samples))

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.path / "ledger", self.layout, self.kv_length, len(self.parts))

    def finished_shards(self) -> set[int]:
        """Shards that are whole, by the ledger."""
        return set(self._entries())

    def _entries(self) -> dict[int, NDArray[np.int64]]:
        """The numbers that the ledger has of the samples of every shard that is whole."""
        found = {shard: self.ledger.numbers(shard) for shard in range(self.num_shards) if self._is_there(shard)}
        return {shard: numbers for shard, numbers in found.items() if numbers is not None}

    @property
    def missing_bytes(self) -> int:
        """What the shards take on disk that are still to be written."""
        missing = set(range(self.num_shards)) - self.finished_shards()
        return sum(self._shard_bytes(self.shard_samples(shard)) for shard in missing)

    def _shard_bytes(self, samples: range) -> int:
        lengths = self.kv_length[samples.start : samples.stop].tolist()
        return self.ledger.entry_bytes + sum(layout.shard_bytes(lengths) for layout in self.layouts.values())

    def _is_there(self, shard: int) -> bool:
        return all(path.is_file() for path in self.shard_paths(shard))

    @property
    def complete(self) -> bool:
        return len(self.finished_shards()) == self.num_shards

    def require_complete(self) -> None:
        """Raise StoreError unless every shard is in the ledger."""
        entries = self._entries()
        if len(entries) != self.num_shards:
            raise StoreError(
                f"{self.path} is incomplete",
                expected=f"{self.num_shards} shards",
                found=len(entries),
                remedy="Run the same `kvpipe extract` again: it goes on where it stopped",
            )
        # Known with it: there may be thousands of entries, and nobody adds any now.
        self.excluded = self._excluded(entries)


def _is_record(record: Any) -> bool:
    names = ("id", "prompt", "reasoning", "answer")
    return isinstance(record, dict) and all(isinstance(record.get(name), str) for name in names)


def _what_is_at(path: Path) -> str:
    if path.is_dir():
        return "a folder without zarr.json"
    return "a file" if path.exists() else "nothing"


def _require_known(path: Path, kind: str, found: str, known: Iterable[str]) -> None:
    if found not in known:
        raise StoreError(
            f"{path} has an unknown {kind}",
            expected=", ".join(known),
            found=found,
            remedy="Read it with the kvpipe that wrote it, or a newer one",
        )
