"""The identity of a store: everything that must match for two extractions to be the same experiment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .errors import StoreError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TeacherIdentity:
    """Which model, to the last bit of its weights."""

    name: str
    revision: str
    num_layers: int
    config_hash: str
    weights_hash: str


@dataclass(frozen=True)
class DatasetIdentity:
    """Which samples, in which order, in which split: as the data set has them, whoever wrote the reasoning then."""

    name: str
    num_samples: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """Written into a store when it is created and compared, field by field, whenever it is used."""

    schema_version: int
    teacher: TeacherIdentity
    tokenizer_hash: str
    dataset: DatasetIdentity
    reasoning: str
    dtype: str
    codec: str
    layers: tuple[int, ...]
    segments: tuple[str, ...]
    eviction: str
    budget: float | None
    queries: bool
    key_position: str
    rope: dict[str, Any]
    max_tokens: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Manifest:
        """Parse a stored manifest. Raises StoreError for another schema, and for missing or unknown fields."""
        require_schema(document)
        teacher = _parse(TeacherIdentity, document.get("teacher"))
        dataset = _parse(DatasetIdentity, document.get("dataset"))
        lists = {name: tuple(document.get(name, ())) for name in ("layers", "segments")}
        whole = {**document, "teacher": teacher, "dataset": dataset, **lists}
        return _parse(cls, whole)

    def require_same(self, found: Manifest, where: str) -> None:
        """Raise StoreError naming the first field in which the store at `where` differs from this manifest."""
        if difference := first_difference(self.to_dict(), found.to_dict()):
            name, expected, other = difference
            raise StoreError(
                f"{where} holds another extraction ({name} differs)",
                expected=expected,
                found=other,
                remedy="Give this extraction its own place with --store, or repeat the options of the stored one",
            )

    @property
    def hash(self) -> str:
        """One short name for the whole identity."""
        return hash_json(self.to_dict())[:16]


def require_schema(document: Mapping[str, Any], where: str = "this store") -> None:
    """Raise StoreError for a stored manifest of another schema version."""
    version = document.get("schema_version")
    # JSON knows `true` and `1.0` as well, which are equal to 1.
    if type(version) is not int or version != SCHEMA_VERSION:
        raise StoreError(
            f"{where} has another schema version",
            expected=SCHEMA_VERSION,
            found=version,
            remedy="Read it with the kvpipe that wrote it, or extract again",
        )


def _parse(cls: type[Any], document: Any) -> Any:
    names = {field.name for field in fields(cls)}
    found = set(document) if isinstance(document, Mapping) else set()
    if found != names:
        raise StoreError(
            f"the store's manifest is damaged ({cls.__name__})",
            expected=sorted(names),
            found=sorted(found),
            remedy="Extract again into a new place",
        )
    return cls(**document)


def _reading_order(name: str) -> int:
    """Names before hashes: the field a reader recognises is reported first."""
    return 1 if name.endswith("hash") else 0


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names; sequences compare as JSON does."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def first_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(dotted name, expected, found) of the first field in which two documents differ, hashes last; else None."""
    left, right = flatten(expected), flatten(found)
    for name in sorted(left | right, key=_reading_order):
        if left.get(name) != right.get(name):
            return name, left.get(name), right.get(name)
    return None


def hash_json(document: Any) -> str:
    """SHA-256 of a JSON document, independent of key order and spacing."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def hash_config(config: PreTrainedConfig) -> str:
    """Hash of an architecture; where it was loaded from and by which transformers does not count."""
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
    return hash_json(_without(config.to_dict(), volatile))


def _without(document: Mapping[Any, Any], names: set[str]) -> dict[Any, Any]:
    """A nested document without some names, at every depth."""
    return {
        name: _without(value, names) if isinstance(value, Mapping) else value
        for name, value in document.items()
        if name not in names
    }


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what a tokenizer does to text: its whole backend, its special tokens and its chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    if tokenizer.is_fast:
        # Set by the last call, not part of the tokenizer.
        backend.pop("truncation", None)
        backend.pop("padding", None)
    template = getattr(tokenizer, "chat_template", None)
    return hash_json([backend, tokenizer.special_tokens_map, *([template] if template else [])])


def hash_weights(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's parameters, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_samples(samples: Iterable[Mapping[str, Any]]) -> str:
    """Hash of an ordered data set."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(hash_json(sample).encode())
    return digest.hexdigest()
