"""Two stores are the same experiment where every field of their manifests is the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.manifest import (
    Manifest,
    flatten,
    hash_config,
    hash_json,
    hash_samples,
    hash_tokenizer,
    hash_weights,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

MakeManifest = Callable[..., Manifest]

CHANGES: dict[str, Any] = {
    "teacher.name": "other",
    "teacher.revision": "v2",
    "teacher.num_layers": 3,
    "teacher.config_hash": "0",
    "teacher.weights_hash": "0",
    "tokenizer_hash": "0",
    "dataset.name": "letters",
    "dataset.num_samples": 4,
    "dataset.hash": "0",
    "reasoning": "teacher",
    "dtype": "float16",
    "codec": "int8",
    "layers": (0,),
    "segments": ("answer",),
    "eviction": "window",
    "budget": 0.5,
    "queries": True,
    "key_position": "pre-rope",
    "rope.rope_theta": 10000.5,
    "rope.factor": 2.0,
    "max_tokens": 65,
    "seed": 1,
}


def changed(manifest: Manifest, name: str, value: Any) -> Manifest:
    outer, _, inner = name.partition(".")
    if not inner:
        return dataclasses.replace(manifest, **{outer: value})
    part = getattr(manifest, outer)
    part = {**part, inner: value} if isinstance(part, dict) else dataclasses.replace(part, **{inner: value})
    return dataclasses.replace(manifest, **{outer: part})


def test_every_field_has_a_change(make_manifest: MakeManifest) -> None:
    """A new field has to be added to CHANGES, so that the tests below cover it."""
    names = set(flatten(make_manifest().to_dict()))
    assert names - {"schema_version", "rope.rope_type"} <= set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_field_is_named(make_manifest: MakeManifest, name: str) -> None:
    manifest = make_manifest()
    other = changed(manifest, name, CHANGES[name])
    with pytest.raises(StoreError) as refusal:
        manifest.require_same(other, "stores/tiny.zarr")
    message = str(refusal.value)
    old, new = flatten(manifest.to_dict()).get(name), flatten(other.to_dict())[name]
    assert message.startswith(
        f"stores/tiny.zarr holds another extraction ({name} differs): expected {old}, found {new}. "
    )
    assert manifest.hash != other.hash


def test_a_name_is_reported_before_a_hash(make_manifest: MakeManifest) -> None:
    manifest = make_manifest()
    other = changed(changed(manifest, "teacher.weights_hash", "0"), "seed", 1)
    with pytest.raises(StoreError, match=r"\(seed differs\)"):
        manifest.require_same(other, "here")


def test_of_several_fields_the_first_in_reading_order_is_reported(make_manifest: MakeManifest) -> None:
    manifest, other = make_manifest(), make_manifest()
    for name in ("seed", "max_tokens", "dtype", "dataset.name", "teacher.revision"):
        other = changed(other, name, CHANGES[name])
        with pytest.raises(StoreError, match=rf"\({name} differs\)"):
            manifest.require_same(other, "here")


def test_a_manifest_survives_json(make_manifest: MakeManifest) -> None:
    manifest = make_manifest()
    restored = Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())))
    manifest.require_same(restored, "here")
    assert restored == manifest
    assert restored.hash == manifest.hash


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused(make_manifest: MakeManifest, version: object) -> None:
    document = {**make_manifest().to_dict(), "schema_version": version}
    with pytest.raises(StoreError, match=f"another schema version: expected 1, found {version}"):
        Manifest.from_dict(document)


@pytest.mark.parametrize("path", [("dtype",), ("teacher",), ("teacher", "name"), ("dataset", "hash")], ids=".".join)
def test_missing_and_unknown_fields_are_refused(make_manifest: MakeManifest, path: tuple[str, ...]) -> None:
    missing, unknown = make_manifest().to_dict(), make_manifest().to_dict()
    *outer, last = path
    for document, change in ((missing, "remove"), (unknown, "add")):
        part = document[outer[0]] if outer else document
        if change == "remove":
            del part[last]
        else:
            part["surprise"] = 1
        with pytest.raises(StoreError, match="manifest is damaged"):
            Manifest.from_dict(document)


# ---------------------------------------------------------------------- hashes


def test_hash_json_ignores_key_order_and_nothing_else() -> None:
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1})
    assert hash_json({"a": 1, "b": [1, 2]}) != hash_json({"a": 1, "b": [2, 1]})
    assert hash_json("\u2028\ud800") != hash_json("\u2028\ud801")


def test_hash_config_is_of_the_architecture(tiny_config: PreTrainedConfig) -> None:
    same, other = deepcopy(tiny_config), deepcopy(tiny_config)
    same._name_or_path, same.dtype, same.use_cache = "elsewhere", torch.float16, False
    other.vocab_size += 1
    assert hash_config(same) == hash_config(tiny_config)
    assert hash_config(other) != hash_config(tiny_config)


def test_hash_config_sees_through_nested_configs() -> None:
    """Loading a multimodal model sets the dtype of its parts as well."""
    config, same, other = (transformers.Gemma3Config() for _ in range(3))
    same.text_config.dtype, same.text_config._name_or_path = torch.float16, "elsewhere"
    other.text_config.head_dim += 1
    assert hash_config(same) == hash_config(config)
    assert hash_config(other) != hash_config(config)


def test_hash_weights_sees_names_dtypes_shapes_and_every_bit() -> None:
    weights = {"a": torch.zeros(2, 3), "b": torch.arange(4.0)}
    variants = [
        weights,
        {**weights, "c": torch.zeros(0)},
        {"a": weights["a"], "c": weights["b"]},
        {**weights, "a": torch.zeros(3, 2)},
        {**weights, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {**weights, "a": -torch.zeros(2, 3)},
        {**weights, "b": torch.nextafter(weights["b"], torch.tensor(9.0))},
        {"a": weights["b"], "b": weights["a"]},
    ]
    assert len({hash_weights(variant.items()) for variant in variants}) == len(variants)
    assert hash_weights(reversed(weights.items())) == hash_weights(weights.items())


def test_hash_weights_is_of_values_not_of_memory() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    strided = tensor.T.contiguous().T.requires_grad_()
    assert not strided.is_contiguous()
    assert hash_weights([("a", strided)]) == hash_weights([("a", tensor)])


def test_hash_samples_sees_order_and_content() -> None:
    samples = [{"id": "0", "prompt": "a"}, {"id": "1", "prompt": "b\ud800"}]
    assert hash_samples(samples) == hash_samples(iter(samples))
    assert hash_samples(samples) != hash_samples(samples[::-1])
    assert hash_samples(samples) != hash_samples(samples[:1])


def word_tokenizer(**options: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "one": 2, "two": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", **options)


def test_hash_tokenizer_is_of_the_tokenizer_not_of_its_last_call() -> None:
    tokenizer = word_tokenizer()
    before = hash_tokenizer(tokenizer)
    tokenizer(["one two", "one"], padding=True, truncation=True, max_length=1)
    assert hash_tokenizer(tokenizer) == before
    assert hash_tokenizer(word_tokenizer()) == before
    tokenizer.add_tokens(["three"])
    assert hash_tokenizer(tokenizer) != before
    assert hash_tokenizer(word_tokenizer(eos_token="two")) != before
