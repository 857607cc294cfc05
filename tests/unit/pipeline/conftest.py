"""Small real stores, models and tokenizers for the tests of the pipeline."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kvpipe.data.sample import Segment
from kvpipe.kvcache.create import TOKEN_BLOCK, SampleTable, create_store, json_lines
from kvpipe.kvcache.layout import KVGeometry, dtype_name
from kvpipe.kvcache.manifest import DatasetIdentity, Manifest, TeacherIdentity
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.writer import ShardWriter
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.experiment_config import Budget, ExperimentConfig
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.finished_runs import ExperimentRuns
from kvpipe.pipeline.questions import LOWER_IS_BETTER, Question
from kvpipe.pipeline.run_directory import RunDirectory, run_of
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 40


@pytest.fixture(autouse=True, scope="module")
def _frozen_heap() -> Iterator[None]:
    """statsmodels collects garbage at every call: keep all that was imported out of its way."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """A random Qwen3, float32 and in eval mode; keywords change its config."""

    def make(seed: int = 0, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
        }
        return Qwen3ForCausalLM(Qwen3Config(**{**config, **changes})).eval()

    return make


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Token `n` reads `wn`; 0 is padding, 1 ends a text, 3 is `####`."""
    words = {"<pad>": 0, "<eos>": 1, "w2": 2, "####": 3, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def make_segmented_store(
    tmp_path_factory: pytest.TempPathFactory, make_manifest: Callable[..., Manifest]
) -> Callable[..., tuple[KVStore, list[Tensor]]]:
    """A complete store of random KV, and that KV: a tensor `[L, 2, H, T, D]` for every sample.

    Channels differ in mean and scale. Each sample is `prompt` tokens of prompt, two of answer, and reasoning
    in between; the fourth of every five is for validation, the fifth for test.
    """

    def make(
        lengths: list[int],
        *,
        layers: int = 3,
        heads: int = 2,
        dim: int = 4,
        prompt: int = 3,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> tuple[KVStore, list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        scale = 0.5 + 3 * torch.rand(layers, 2, heads, 1, dim, generator=generator)
        shift = 2 * torch.randn(layers, 2, heads, 1, dim, generator=generator)
        kv = [(torch.randn(layers, 2, heads, n, dim, generator=generator) * scale + shift).to(dtype) for n in lengths]
        table = _table(lengths, prompt, seed)
        geometry = KVGeometry(layers, heads, dim, dtype)
        store = create_store(
            tmp_path_factory.mktemp("segmented") / "test.zarr",
            make_manifest(
                dtype=dtype_name(dtype),
                layers=tuple(range(layers)),
                teacher=TeacherIdentity("tiny", "main", layers, "c0ffee", "facade"),
                dataset=DatasetIdentity("numbers", len(lengths), "beaded"),
            ),
            table,
            geometry,
            tokenizer_files={"tokenizer.json": b"{}"},
            truncated=0,
            samples_per_shard=max(1, 4 * len(lengths) // sum(-(-n // TOKEN_BLOCK) for n in lengths)),
        )
        with ShardWriter(store, range(store.num_shards)) as writer:
            for index, sample in enumerate(kv):
                writer.put([index], [(layer[0][None], layer[1][None]) for layer in sample])
        store.add_extraction(12.5, sum(lengths), "cpu", None)
        return KVStore.open(store.path), kv

    return make


def _table(lengths: list[int], prompt: int, seed: int) -> SampleTable:
    count, rng = len(lengths), np.random.default_rng(seed)
    input_ids = np.concatenate([rng.integers(2, VOCABULARY, length) for length in lengths]).astype(np.int32)
    segment_ids = [np.full(length, Segment.REASONING, np.int8) for length in lengths]
    for segments in segment_ids:
        segments[-2:] = Segment.ANSWER
        segments[:prompt] = Segment.PROMPT
    return SampleTable(
        text=json_lines(
            {"id": f"s/{i}", "prompt": f"p{i}", "reasoning": f"r{i}", "answer": f"w{i}"} for i in range(count)
        ),
        split_names=("train", "validation", "test"),
        split=np.array([{3: 1, 4: 2}.get(i % 5, 0) for i in range(count)], np.int8),
        length=np.asarray(lengths, np.int32),
        input_ids=input_ids,
        segment_ids=np.concatenate(segment_ids),
        spans=np.zeros((len(input_ids), 2), np.int32),
    )


@dataclass(frozen=True)
class FinishedExperiment:
    """An experiment whose run directories are on disk."""

    config: ExperimentConfig
    outcome: ExperimentRuns
    runs_dir: Path


@pytest.fixture(scope="session")
def make_experiment(
    tmp_path_factory: pytest.TempPathFactory, make_segmented_store: Callable[..., tuple[KVStore, list[Tensor]]]
) -> Callable[..., FinishedExperiment]:
    """Synthetic finished runs. `arms` gives each arm its mean cross-entropy; `without` names runs that failed.

    Every number of a run follows from its arm and seed. `edit` may change a record before it is written.
    """

    store, _ = make_segmented_store([5, 9, 12])

    def make(
        arms: Mapping[str, float],
        *,
        seeds: int = 6,
        comparisons: Sequence[Question] | None = None,
        without: Mapping[str, str] | None = None,
        edit: Callable[[str, dict[str, Any]], None] = lambda name, record: None,
        curve: bool = True,
        primary_metric: str = "ce",
        recipes: Mapping[str, DistillConfig] | None = None,
    ) -> FinishedExperiment:
        first, *others = arms
        config = ExperimentConfig(
            name="synthetic",
            primary_metric=primary_metric,
            greater_is_better=primary_metric not in LOWER_IS_BETTER,
            budget=Budget(max_steps=40),
            seeds=tuple(range(seeds)),
            extract=ExtractConfig(model="teacher", store=store.path),
            arms=dict(recipes or {arm: DistillConfig(mode="none" if arm == first else "flat") for arm in arms}),
            comparisons=tuple(comparisons or [Question(arm, first) for arm in others]),
        )
        failures, records, runs_dir = dict(without or {}), {}, tmp_path_factory.mktemp("runs")
        for run in config.runs:
            name, arm, recipe = run.name, run.arm, run.recipe
            if name in failures:
                continue
            noise = 2 + 2 * math.sin(7 * recipe.seed + 3 * list(arms).index(arm) ** 2)
            ce = arms[arm] + 0.01 * recipe.seed + 0.002 * noise
            record = _run_record(name, recipe, ce, store.manifest.hash)
            edit(name, record)
            directory = RunDirectory(runs_dir / name)
            logs = [{"step": step, "eval_ce": ce + 1 / step} for step in (10, 20, 40)] if curve else []
            lines = [{"step": 5, "loss": 2.0}, *logs]
            directory.claim(run_of(record), overwrite=False)
            directory.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            directory.predictions.write_text("".join(_predictions(record["metrics"]["ce"], recipe.seed)))
            records[name] = directory.finish(record)
        return FinishedExperiment(config, ExperimentRuns(records, failures), runs_dir)

    return make


def _predictions(ce: float, seed: int) -> Iterator[str]:
    """Four samples of three tokens each, whose mean cross-entropy is the run's."""
    for sample in range(4):
        own = 0.001 * ((seed + 2 * sample) % 5 - ((seed + 2 * (sample ^ 1)) % 5))
        yield f"{json.dumps({'tokens': 3, 'ce': ce + own, 'token_accuracy': 1 - ce - own, 'exact': None})}\n"


def _run_record(name: str, recipe: DistillConfig, ce: float, manifest: str) -> dict[str, Any]:
    return {
        "name": name,
        "config": recipe.to_dict(),
        "steps": 40,
        "tokens": 960,
        "train_samples": 120,
        "common_samples": 120,
        "collapsed": False,
        "absorbed": False,
        "router_collapsed": False,
        "kv_gradient_share": None if recipe.mode == "none" else 0.4,
        "parameters": {"student": 1000, "aligner": 0 if recipe.mode == "none" else 1234},
        "metrics": {"ce": ce, "token_accuracy": 1 - ce, "exact_match": None},
        "seconds": {"setup": 1.0, "train": 6.0, "data_wait": 0.5, "evaluation": 1.0, "total": 8.0 + recipe.seed},
        "data_wait_share": 0.083,
        "teacher_forwards": 0,
        "threads": 1,
        "stores": [{"path": "stores/teacher.zarr", "manifest": manifest}],
        "student": {},
        "versions": {"python": "3.11", "kvpipe": "0.1.0"},
        "pairing": {"student_init": f"i{recipe.seed}", "data_order": f"o{recipe.seed}", "eval_samples": "e"},
    }
