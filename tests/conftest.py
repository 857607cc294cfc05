"""Fixtures for all tests. Shape and type annotations of kvpipe are checked here, and only here."""

from __future__ import annotations

import os

# Before the libraries are imported, and for the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
)

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import settings
from jaxtyping import install_import_hook
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

install_import_hook("kvpipe", "beartype.beartype")

# Only now: the hook sees the modules that are imported after it.
from kvpipe.kvcache.create import TOKEN_BLOCK, SampleTable, create_store, json_lines  # noqa: E402
from kvpipe.kvcache.layout import KVGeometry, take_tokens  # noqa: E402
from kvpipe.kvcache.manifest import DatasetIdentity, Manifest, TeacherIdentity  # noqa: E402
from kvpipe.kvcache.store import KVStore  # noqa: E402
from kvpipe.kvcache.writer import ShardWriter  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("kvpipe", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("kvpipe")

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MULTI_HEAD = {name: value for name, value in _SIZES.items() if name != "num_key_value_heads"}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

TINY_CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "llama": transformers.LlamaConfig(**_SIZES),
    "qwen2": transformers.Qwen2Config(**_SIZES),
    "qwen3": transformers.Qwen3Config(**_SIZES, head_dim=16),
    "mistral": transformers.MistralConfig(**_SIZES, sliding_window=4),
    "gemma2": transformers.Gemma2Config(**_SIZES, head_dim=16, sliding_window=4),
    "gemma3": transformers.Gemma3TextConfig(**_SIZES, head_dim=16, sliding_window=4, layer_types=_MIXED),
    "phi3": transformers.Phi3Config(**_SIZES),
    "gpt_neox": transformers.GPTNeoXConfig(**_MULTI_HEAD),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", choices=("quick", "full"), default="quick", help="how many faults tests/faults tries")


@pytest.fixture(params=sorted(TINY_CONFIGS))
def tiny_config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    """A small configuration of every architecture under test, one after the other."""
    return deepcopy(TINY_CONFIGS[request.param])


@pytest.fixture
def tiny_model(tiny_config: PreTrainedConfig) -> PreTrainedModel:
    """A random model of every architecture, in float64 and eval mode."""
    return _random_model(tiny_config, torch.float64)


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., PreTrainedModel]:
    """`make_tiny_model("qwen3", dtype=torch.float32)`: a random model of one architecture, in eval mode."""

    def make(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        return _random_model(deepcopy(TINY_CONFIGS[architecture]), dtype, seed)

    return make


def _random_model(config: PreTrainedConfig, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Manifest]:
    """`make_manifest(seed=1)`: a manifest with some fields changed."""

    def make(**changes: Any) -> Manifest:
        fields: dict[str, Any] = {
            "schema_version": 1,
            "teacher": TeacherIdentity("tiny", "main", 2, "c0ffee", "facade"),
            "tokenizer_hash": "decade",
            "dataset": DatasetIdentity("numbers", 3, "beaded"),
            "reasoning": "dataset",
            "dtype": "bfloat16",
            "codec": "raw",
            "layers": (0, 1),
            "segments": ("prompt", "reasoning", "answer"),
            "eviction": "none",
            "budget": None,
            "queries": False,
            "key_position": "post-rope",
            "rope": {"rope_theta": 10000.0, "rope_type": "default"},
            "max_tokens": 64,
            "seed": 0,
        }
        return Manifest(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def make_store(
    tmp_path_factory: pytest.TempPathFactory, make_manifest: Callable[..., Manifest]
) -> Callable[..., tuple[KVStore, Tensor]]:
    """`store, kv = make_store([5, 40, 33], samples_per_shard=2)`: a store and what is in it.

    `kv` is `[L, 2, B, H, T, D]`, random, zero past a sample's length. With `fill=False` no shard is written. With
    `kept`, so many tokens of every sample are, every other from the second on. With `query_heads`, the store keeps
    queries, which `random_queries(store)` gives.
    """

    def make(
        lengths: Sequence[int],
        *,
        samples_per_shard: int = 2,
        dtype: torch.dtype = torch.bfloat16,
        num_layers: int = 2,
        num_kv_heads: int = 2,
        head_dim: int = 4,
        records: Sequence[dict[str, Any]] | None = None,
        tokenizer_files: dict[str, bytes] | None = None,
        codec: str = "raw",
        kept: Sequence[int] | None = None,
        query_heads: int = 0,
        fill: bool = True,
    ) -> tuple[KVStore, Tensor]:
        geometry = KVGeometry(num_layers, num_kv_heads, head_dim, dtype, query_heads)
        table = _sample_table(lengths, records)
        if kept is not None:
            table = replace(table, kv_length=np.asarray(kept, np.int32))
        store = create_store(
            tmp_path_factory.mktemp("store") / "tiny.zarr",
            make_manifest(
                dtype=str(dtype).removeprefix("torch."),
                codec=codec,
                queries=query_heads > 0,
                layers=tuple(range(num_layers)),
                teacher=TeacherIdentity("tiny", "main", num_layers, "c0ffee", "facade"),
                dataset=DatasetIdentity("numbers", len(lengths), "beaded"),
            ),
            table,
            geometry,
            tokenizer_files=tokenizer_files or {},
            truncated=0,
            samples_per_shard=samples_per_shard,
        )
        kv = _random_kv(store)
        if fill:
            with ShardWriter(store, range(store.num_shards)) as writer:
                pairs, positions = [(key, value) for key, value in kv], None
                queries = list(_random_queries(store)) if query_heads else None
                if kept is not None:
                    positions = every_other(kept)
                    pairs = [(take_tokens(key, positions), take_tokens(value, positions)) for key, value in pairs]
                    queries = queries and [take_tokens(query, positions) for query in queries]
                writer.put(range(len(lengths)), pairs, positions, queries=queries)
        return store, kv

    return make


@pytest.fixture(scope="session")
def random_queries() -> Callable[[KVStore], Tensor]:
    """`random_queries(store)`: queries `[L, B, Hq, T, D]` of every token, zero past a sample's length: those that
    `make_store` writes."""
    return _random_queries


def _random_queries(store: KVStore) -> Tensor:
    num_layers, _, batch, _, width, head_dim = store.shape
    shape = num_layers, batch, store.geometry.num_query_heads, width, head_dim
    queries = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(store.dtype)
    for sample, length in enumerate(store.length.tolist()):
        queries[:, sample, :, length:] = 0
    return queries


def every_other(kept: Sequence[int]) -> Tensor:
    """Positions 1, 3, 5, ... of so many tokens of every sample, -1 past the last."""
    places = 2 * torch.arange(max(kept)) + 1
    return torch.stack([torch.where(torch.arange(max(kept)) < count, places, -1) for count in kept])


def _sample_table(lengths: Sequence[int], records: Sequence[dict[str, Any]] | None) -> SampleTable:
    num_samples, padded = len(lengths), -(-max(lengths) // TOKEN_BLOCK) * TOKEN_BLOCK
    tokens = np.concatenate([np.arange(length, dtype=np.int32) + i * padded for i, length in enumerate(lengths)])
    return SampleTable(
        text=json_lines(
            records or [{"id": str(i), "prompt": f"p{i}", "reasoning": "r", "answer": "a"} for i in range(num_samples)]
        ),
        split_names=("train", "test"),
        split=(np.arange(num_samples) % 2).astype(np.int8),
        length=np.asarray(lengths, np.int32),
        input_ids=tokens % 50 + 1,
        segment_ids=np.ones(len(tokens), np.int8),
        spans=np.repeat(tokens[:, None], 2, axis=1),
    )


def _random_kv(store: KVStore) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(store.shape, generator=generator).to(store.dtype)
    for sample, length in enumerate(store.length.tolist()):
        kv[:, :, sample, :, length:] = 0
    return kv


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).parent.parent
