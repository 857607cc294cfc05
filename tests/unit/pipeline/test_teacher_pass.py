"""What a store keeps of the teacher's forward: queries and keys that give the teacher's own attention."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpipe.kvcache.errors import ModelError
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.summary import kept_as, summarise
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.models import builtin_teachers
from kvpipe.pipeline.repair import repair
from kvpipe.pipeline.teacher_pass import run_teacher
from rich.progress import Progress
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedConfig, PreTrainedModel

LENGTHS = [12, 5, 40, 33]


def seen_tokens(config: PreTrainedConfig, layer: int, length: int) -> Tensor:
    """Which tokens `[query, key]` the attention of a layer sees."""
    places = torch.arange(length)
    behind = places[:, None] - places
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * 3
    window = getattr(config, "sliding_window", None) if types[layer] == "sliding_attention" else None
    return (behind >= 0) & (behind < (window or length))


def shape_of(config: PreTrainedConfig) -> dict[str, int]:
    """What a store of the KV of a tiny model is made with."""
    heads = getattr(config, "num_key_value_heads", None) or 4
    return {"num_layers": 3, "num_kv_heads": heads, "head_dim": getattr(config, "head_dim", None) or 8}


def test_a_teacher_that_computes_in_float32_is_rounded_once(
    make_store: Callable[..., tuple[KVStore, Any]], tiny_model: PreTrainedModel
) -> None:
    model = tiny_model.float()
    shape = shape_of(model.config)
    exact, rounded = (
        make_store(LENGTHS, dtype=dtype, query_heads=4, fill=False, **shape)[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    for store in (exact, rounded):
        run_teacher(store, model, 2, Progress(disable=True))
    of_float32, of_bfloat16 = KVReader(exact), KVReader(rounded)
    assert torch.equal(of_bfloat16.read(range(4)), of_float32.read(range(4)).bfloat16())
    assert torch.equal(of_bfloat16.read_queries(range(4)), of_float32.read_queries(range(4)).bfloat16())


def test_stored_queries_and_keys_give_the_attention_of_every_layer(
    make_store: Callable[..., tuple[KVStore, Any]], tiny_model: PreTrainedModel
) -> None:
    """Also where several query heads share a key head."""
    model = tiny_model.float()
    geometry = shape_of(model.config)
    heads = geometry["num_kv_heads"]
    store, _ = make_store(LENGTHS, dtype=torch.float32, query_heads=4, fill=False, **geometry)
    run_teacher(store, model, 2, Progress(disable=True))
    reader = KVReader(store)
    keys, queries = reader.read(range(4))[:, 0].repeat_interleave(4 // heads, 2), reader.read_queries(range(4))
    model.set_attn_implementation("eager")
    for row, length in enumerate(LENGTHS):
        ids = torch.from_numpy(store.input_ids[row, :length]).long()[None]
        with torch.no_grad():
            attention = model(ids, output_attentions=True).attentions
        for layer, expected in enumerate(attention):
            logits = queries[layer, row, :, :length] @ keys[layer, row, :, :length].transpose(-1, -2)
            if cap := getattr(model.config, "attn_logit_softcapping", None):
                logits = cap * torch.tanh(logits / cap)
            hidden = ~seen_tokens(model.config, layer, length)
            assert torch.allclose(logits.masked_fill(hidden, -torch.inf).softmax(-1), expected[0], atol=1e-6)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, KVStore]:
    """The same extraction without and with queries: lossy, of two layers, evicted by a policy that looks at some."""
    folder = tmp_path_factory.mktemp("extracted")
    config = ExtractConfig("qwen", folder / "x.zarr", samples=24, eval_samples=4, max_shard_bytes=400_000, batch_size=8)
    config = replace(config, codec="int8", layers="1,3", evict="rkv", budget=0.5)
    return {kept: extract(replace(config, queries=kept, store=folder / f"{kept}.zarr")).store for kept in (False, True)}


def kv_files(store: KVStore) -> dict[str, bytes]:
    files = [path for shard in range(store.num_shards) for path in store.shard_paths(shard)[:3]]
    return {path.relative_to(store.path).as_posix(): path.read_bytes() for path in files}


def test_queries_change_no_byte_of_the_kv(extracted: dict[bool, KVStore]) -> None:
    plain, store = extracted.values()
    assert list(store.parts) == [*plain.parts, "queries"] == ["kv", "kv_scale", "kv_position", "queries"]
    assert plain.num_shards > 2
    assert kv_files(store) == kv_files(plain)
    for found, expected in zip(*(KVReader(s).read_with_positions(range(32)) for s in (store, plain)), strict=True):
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)


def test_a_store_says_that_it_has_queries(extracted: dict[bool, KVStore]) -> None:
    plain, store = extracted.values()
    assert (kept_as(plain) + ", with queries") == kept_as(store)
    bytes_per_token = [summarise(found)["bytes_per_token_of_queries"] for found in (plain, store)]
    assert bytes_per_token == [0, 2 * 4 * 32 * 2]
    assert [found.manifest.queries for found in (plain, store)] == [False, True]


def test_a_damaged_queries_file_is_written_anew_as_it_was(extracted: dict[bool, KVStore], tmp_path: Path) -> None:
    shutil.copytree(extracted[True].path, tmp_path / "x.zarr")
    store = KVStore.open(tmp_path / "x.zarr")
    before = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file() and path.name != "zarr.json"}
    damaged = store.shard_paths(1)[-1]
    damaged.write_bytes(bytes([before[damaged][0] ^ 1]) + before[damaged][1:])
    assert [damage.shard for damage in repair(store.path)] == [1]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("needs", [{"queries": True}, {"evict": "rkv", "budget": 0.5}], ids=["kept", "looked at"])
def test_a_teacher_whose_queries_cannot_be_seen_is_refused_before_anything_is_written(
    tmp_path: Path, needs: dict[str, Any]
) -> None:
    """GPT-J has an attention of its own."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin_teachers()["qwen"] / name, teacher)
    sizes = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4}
    GPTJForCausalLM(GPTJConfig(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained(teacher)
    config = ExtractConfig(str(teacher), tmp_path / "stores" / "x.zarr", samples=4, eval_samples=2, **needs)
    with pytest.raises(ModelError, match="this model's queries cannot be seen"):
        extract(config)
    assert not config.store.exists()
    assert not list(tmp_path.glob("stores/*zarr*"))
