"""A store belongs to one teacher, tokenizer and data set, a run to one store: anything else is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpipe.data.corpus import load_corpus
from kvpipe.data.word_problems import generate
from kvpipe.kvcache.errors import ConfigError, StoreError
from kvpipe.kvcache.integrity import seal
from kvpipe.kvcache.manifest import (
    SCHEMA_VERSION,
    Manifest,
    flatten,
    hash_config,
    hash_samples,
    hash_tokenizer,
    hash_weights,
)
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.verify import require_side_arrays, verify_shards
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.run_directory import RunDirectory, run_identity
from kvpipe.pipeline.teacher_recipes import new_model, train_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import Tally

MakeStore = Callable[..., tuple[KVStore, Tensor]]

FIELDS: dict[str, Any] = {
    "teacher.name": "other",
    "teacher.revision": "v2",
    "teacher.num_layers": 5,
    "teacher.config_hash": "c0ffef",
    "teacher.weights_hash": "facadf",
    "tokenizer_hash": "decadf",
    "dataset.name": "letters",
    "dataset.num_samples": 4,
    "dataset.hash": "beadee",
    "reasoning": "teacher",
    "dtype": "float16",
    "layers": [0, 2],
    "segments": ["answer"],
    "eviction": "random",
    "budget": 0.5,
    "key_position": "pre-rope",
    "rope.rope_theta": 10000.5,
    "rope.rope_type": "yarn",
    "rope.factor": 2.0,
    "max_tokens": 65,
    "seed": 1,
}
"""Another value of every field; `rope.factor` is one that was not there."""

RECIPE: dict[str, Any] = {
    "mode": "flat",
    "student": "other",
    "random_init": True,
    "layer_map": "skip",
    "time_map": "segment",
    "segment_ratio": "reasoning=0.5",
    "segment_interpolation": "nearest",
    "key_space": "pre-rope",
    "direction": "teacher-to-student-joint",
    "share_dim_proj": False,
    "share_layers": True,
    "match_params": "structured",
    "start": "closed-form",
    "closed_form": "procrustes",
    "kv_control": "shuffled",
    "fusion": "learned",
    "fusion_weights": "1,2",
    "fusion_per": "token",
    "fusion_temperature": 0.5,
    "fusion_prototypes": 4,
    "router": "mlp",
    "router_entropy": 0.1,
    "kv_loss": "smooth-l1",
    "kv_segments": "reasoning",
    "kv_weight": 2.0,
    "learning_rate": 2e-3,
    "aligner_learning_rate": 1e-3,
    "weight_decay": 0.0,
    "warmup_ratio": 0.1,
    "batch_size": 8,
    "epochs": 2.0,
    "max_steps": 5,
    "max_train_tokens": 500,
    "samples": 1,
    "eval_split": "validation",
    "max_new_tokens": 8,
    "on_collapse": "warn",
    "bf16": True,
    "seed": 1,
}


def with_field(document: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    changed = deepcopy(document)
    *outer, last = name.split(".")
    part = changed
    for key in outer:
        part = part[key]
    part[last] = value
    return changed


def resealed(store: Path, copy: Path, manifest: dict[str, Any]) -> Path:
    """A store like another but for its manifest, and as whole."""
    shutil.copytree(store, copy)
    document = json.loads((copy / "zarr.json").read_text())
    document["attributes"]["kvpipe"] = seal({**document["attributes"]["kvpipe"], "manifest": manifest})
    (copy / "zarr.json").write_text(json.dumps(document))
    return copy


def test_every_field_has_another_value(make_manifest: Callable[..., Manifest]) -> None:
    """A new field has to be added here, so that the tests below cover it."""
    # A store where one of these was changed alone has not the arrays to it: it is damaged. `OPTIONS` has real ones.
    others = {"schema_version", "codec", "queries"}
    assert set(flatten(make_manifest().to_dict())) - others == set(FIELDS) - {"rope.factor"}
    assert {field.name for field in dataclasses.fields(DistillConfig)} == set(RECIPE)


def test_a_store_of_another_extraction_is_refused_by_the_field(
    make_store: MakeStore, tmp_path: Path, tally: Tally
) -> None:
    store, _ = make_store([5, 40])
    wanted, refused = store.manifest, 0
    for number, (name, value) in enumerate(FIELDS.items()):
        path = resealed(store.path, tmp_path / f"{number}.zarr", with_field(wanted.to_dict(), name, value))
        before = path.joinpath("zarr.json").read_bytes()
        with pytest.raises(StoreError) as refusal:
            wanted.require_same(KVStore.open(path).manifest, str(path))
        expected = flatten(wanted.to_dict()).get(name)
        sentence = f"{path} holds another extraction ({name} differs): expected {expected}, found {value}. "
        assert str(refusal.value).startswith(sentence)
        assert path.joinpath("zarr.json").read_bytes() == before
        refused += 1
    wanted.require_same(KVStore.open(store.path).manifest, "itself")
    tally.add("wrong pairing: resumed store", **dict.fromkeys(("tried", "injected", "detected"), refused), lost=0)


def test_a_run_of_another_store_is_refused(make_store: MakeStore, tmp_path: Path, tally: Tally) -> None:
    store, _ = make_store([5, 40])
    run = RunDirectory(tmp_path / "run")
    own = run_identity(DistillConfig(), [store])
    run.claim(own, overwrite=False)
    hashes = {store.manifest.hash}
    for number, (name, value) in enumerate(FIELDS.items()):
        path = resealed(store.path, tmp_path / f"{number}.zarr", with_field(store.manifest.to_dict(), name, value))
        other = run_identity(DistillConfig(), [KVStore.open(path)])
        with pytest.raises(ConfigError) as refusal:
            run.require_free(other, overwrite=False)
        sentence = f"holds another run (stores differs): expected {other['stores']}, found {own['stores']}. "
        assert sentence in str(refusal.value)
        hashes.update(other["stores"])
    assert len(hashes) == len(FIELDS) + 1
    run.require_free(own, overwrite=False)
    assert json.loads((run.path / "config.json").read_text()) == own
    tally.add(
        "wrong pairing: run of another store", **dict.fromkeys(("tried", "injected", "detected"), len(FIELDS)), lost=0
    )


def test_a_run_of_another_recipe_is_refused_by_the_field(make_store: MakeStore, tmp_path: Path, tally: Tally) -> None:
    store, _ = make_store([5, 40])
    run, config = RunDirectory(tmp_path / "run"), DistillConfig()
    run.claim(run_identity(config, [store]), overwrite=False)
    for name, value in RECIPE.items():
        other = with_field(run_identity(config, [store]), f"config.{name}", value)
        with pytest.raises(ConfigError) as refusal:
            run.require_free(other, overwrite=False)
        sentence = f"(config.{name} differs): expected {value}, found {getattr(config, name)}. "
        assert sentence in str(refusal.value)
    tally.add("wrong pairing: run of another recipe", **dict.fromkeys(("tried", "injected", "detected"), len(RECIPE)))


# ---------------------------------------------------------------------- schema versions

OTHER_VERSIONS = [-1, 0, SCHEMA_VERSION + 1, SCHEMA_VERSION + 2, 1000, 10**20, str(SCHEMA_VERSION), None, [], {}]


@pytest.mark.parametrize("version", OTHER_VERSIONS, ids=str)
def test_a_store_of_another_schema_version_is_refused_by_it(
    make_store: MakeStore, tmp_path: Path, version: object
) -> None:
    """Whatever else such a version may have changed."""
    store, _ = make_store([5])
    manifest = {**store.manifest.to_dict(), "schema_version": version}
    fewer = {name: value for name, value in manifest.items() if name not in ("codec", "teacher")}
    for number, document in enumerate((manifest, {**manifest, "quantisation": "int4"}, fewer)):
        with pytest.raises(StoreError) as refusal:
            KVStore.open(resealed(store.path, tmp_path / f"{number}.zarr", document))
        assert f"another schema version: expected {SCHEMA_VERSION}, found {version}. Read it with" in str(refusal.value)


def test_a_store_without_a_schema_version_is_refused(make_store: MakeStore, tmp_path: Path) -> None:
    store, _ = make_store([5])
    manifest = store.manifest.to_dict()
    del manifest["schema_version"]
    with pytest.raises(StoreError, match="another schema version: expected 1, found None"):
        KVStore.open(resealed(store.path, tmp_path / "x.zarr", manifest))


def test_every_schema_ever_released_still_reads(root: Path) -> None:
    """`tests/golden` keeps one store of each."""
    released = sorted((root / "tests" / "golden").glob("*.zarr"))
    assert released
    for path in released:
        store = KVStore.open(path)
        require_side_arrays(store)
        assert not any(verify_shards(store)), path
        assert KVReader(store).read(range(store.num_samples)).isfinite().all()
        assert len(store.records) == store.num_samples == len(store.input_ids) == len(store.segment_ids)
        assert sum(len(store.indices(split)) for split in store.split_names) == store.num_samples
        assert store.tokenizer_files()
    assert SCHEMA_VERSION in {KVStore.open(path).manifest.schema_version for path in released}


# ---------------------------------------------------------------------- real parts


def write_teacher(folder: Path) -> None:
    tokenizer = train_tokenizer(list(generate("train", 100, 0)))
    torch.manual_seed(0)
    new_model(tokenizer).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_samples(path: Path, order: slice, count: int = 12) -> None:
    samples = list(generate("train", count, 0))[order]
    path.write_text("".join(f"{json.dumps(asdict(sample))}\n" for sample in samples))


def nudge_a_weight(folder: Path) -> None:
    """One weight by the smallest step there is."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    before = hash_weights(model.state_dict().items())
    weight = model.base_model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(torch.int16)[3, 5] += 1
    assert hash_weights(model.state_dict().items()) != before
    model.save_pretrained(folder)


def edit_config(folder: Path, name: str, value: object) -> None:
    file = folder / "config.json"
    before = hash_config(AutoModelForCausalLM.from_pretrained(folder).config)
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    assert hash_config(AutoModelForCausalLM.from_pretrained(folder).config) != before


def edit_tokenizer(folder: Path, change: Callable[[Any], object]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = hash_tokenizer(tokenizer)
    change(tokenizer)
    assert hash_tokenizer(tokenizer) != before
    tokenizer.save_pretrained(folder)


def add_chat_template(folder: Path) -> None:
    edit_tokenizer(folder, lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages[0].content }}"))


def add_a_token(folder: Path) -> None:
    edit_tokenizer(folder, lambda tokenizer: tokenizer.add_tokens(["qzx"]))


def turn_rope(folder: Path) -> None:
    edit_config(folder, "rope_parameters", {"rope_type": "default", "rope_theta": 10000.5})


PARTS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "a weight": (nudge_a_weight, {"teacher.weights_hash"}),
    "a number in the config": (lambda f: edit_config(f, "rms_norm_eps", 2e-6), {"teacher.config_hash"}),
    "the RoPE base": (turn_rope, {"teacher.config_hash", "rope.rope_theta"}),
    "a chat template": (add_chat_template, {"tokenizer_hash"}),
    "a token": (add_a_token, {"tokenizer_hash"}),
}
OPTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "seed": ({"seed": 1}, {"seed"}),
    "max_tokens": ({"max_tokens": 100}, {"max_tokens"}),
    "dtype": ({"dtype": "float16"}, {"dtype", "teacher.weights_hash"}),
    "codec": ({"codec": "int8"}, {"codec"}),
    "layers": ({"layers": "ratio:1"}, {"layers"}),
    "queries": ({"queries": True}, {"queries"}),
    "fewer samples": ({"samples": 8}, {"dataset.num_samples", "dataset.hash"}),
}


@pytest.fixture(scope="module")
def extraction(tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    """A finished extraction of a real random teacher."""
    folder = tmp_path_factory.mktemp("extraction")
    write_teacher(folder / "teacher")
    write_samples(folder / "numbers.jsonl", slice(None))
    config = ExtractConfig(str(folder / "teacher"), folder / "x.zarr", dataset=str(folder / "numbers.jsonl"))
    assert extract(config).store.complete
    return config


def require_only(fields: set[str], changed: ExtractConfig, sound: ExtractConfig, tmp_path: Path) -> None:
    """A changed extraction is refused on the sound store, which stays as it is; alone, it differs in these fields."""
    before = {path: path.read_bytes() for path in sound.store.rglob("*") if path.is_file()}
    with pytest.raises(StoreError) as refusal:
        extract(replace(changed, store=sound.store))
    assert {path: path.read_bytes() for path in sound.store.rglob("*") if path.is_file()} == before
    own, other = (
        flatten(found.manifest.to_dict())
        for found in (KVStore.open(sound.store), extract(replace(changed, store=tmp_path / "other.zarr")).store)
    )
    assert {name for name in own | other if own.get(name) != other.get(name)} == fields
    named = next(name for name in fields if f"({name} differs)" in str(refusal.value))
    shown = "nothing" if own[named] == "" else own[named]
    assert f"expected {other[named]}, found {shown}. " in str(refusal.value)


@pytest.mark.parametrize("part", PARTS)
def test_another_part_of_the_teacher_changes_its_own_field(
    extraction: ExtractConfig, tmp_path: Path, tally: Tally, part: str
) -> None:
    change, fields = PARTS[part]
    shutil.copytree(extraction.model, tmp_path / "teacher")
    change(tmp_path / "teacher")
    require_only(fields, replace(extraction, model=str(tmp_path / "teacher")), extraction, tmp_path)
    tally.add("wrong pairing: real parts", tried=1, injected=1, detected=1, lost=0)


@pytest.mark.parametrize("option", OPTIONS)
def test_another_option_changes_its_own_field(
    extraction: ExtractConfig, tmp_path: Path, tally: Tally, option: str
) -> None:
    changes, fields = OPTIONS[option]
    require_only(fields, replace(extraction, **changes), extraction, tmp_path)
    tally.add("wrong pairing: real parts", tried=1, injected=1, detected=1, lost=0)


def test_another_order_of_the_samples_changes_the_hash_of_the_data_alone(
    extraction: ExtractConfig, tmp_path: Path, tally: Tally
) -> None:
    write_samples(tmp_path / "numbers.jsonl", slice(None, None, -1))
    first, second = (
        load_corpus(str(path), None, 256, 0).splits for path in (extraction.dataset, tmp_path / "numbers.jsonl")
    )
    for split in first:
        assert sorted(map(repr, first[split])) == sorted(map(repr, second[split]))
    assert hash_samples(map(asdict, first["train"])) != hash_samples(map(asdict, second["train"]))
    require_only({"dataset.hash"}, replace(extraction, dataset=str(tmp_path / "numbers.jsonl")), extraction, tmp_path)
    tally.add("wrong pairing: real parts", tried=1, injected=1, detected=1, lost=0)


def test_names_of_teacher_and_data_are_fields_of_their_own(
    extraction: ExtractConfig, tmp_path: Path, tally: Tally
) -> None:
    shutil.copytree(extraction.model, tmp_path / "renamed")
    shutil.copy(extraction.dataset, tmp_path / "renamed.jsonl")
    require_only({"teacher.name"}, replace(extraction, model=str(tmp_path / "renamed")), extraction, tmp_path)
    shutil.rmtree(tmp_path / "other.zarr")
    require_only({"dataset.name"}, replace(extraction, dataset=str(tmp_path / "renamed.jsonl")), extraction, tmp_path)
    tally.add("wrong pairing: real parts", tried=2, injected=2, detected=2, lost=0)


def test_the_same_extraction_again_is_not_refused(extraction: ExtractConfig) -> None:
    assert extract(extraction).teacher_tokens == 0
