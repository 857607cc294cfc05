"""A teacher whose KV is not finite: those samples are known, left out, and never tried again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpipe.data.word_problems import generate
from kvpipe.kvcache.errors import DivergenceError, ModelError, StoreError
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.verify import verify_shards
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.distill import distill
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.teacher_recipes import new_model, train_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conftest import Tally

Change = Callable[[PreTrainedModel, PreTrainedTokenizerBase], None]
MakeTeacher = Callable[[Change], ExtractConfig]


@pytest.fixture
def broken_teacher(tmp_path: Path) -> MakeTeacher:
    """A random teacher, changed by a function, and the extraction that runs it."""

    def make(change: Change) -> ExtractConfig:
        tokenizer = train_tokenizer(list(generate("train", 200, 0)))
        torch.manual_seed(0)
        model = new_model(tokenizer)
        with torch.no_grad():
            change(model, tokenizer)
        model.save_pretrained(tmp_path / "teacher")
        tokenizer.save_pretrained(tmp_path / "teacher")
        return ExtractConfig(
            str(tmp_path / "teacher"), tmp_path / "x.zarr", samples=40, eval_samples=8, max_shard_bytes=400_000
        )

    return make


RARE = "7"
"""Its token, every digit being one, is in some samples and not in others."""


def break_a_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(RARE)] = float("nan")


@pytest.mark.parametrize("options", [{}, {"evict": "rkv", "budget": 0.3}], ids=["whole", "evicted"])
def test_samples_with_nan_are_left_out_and_all_else_goes_on(
    broken_teacher: MakeTeacher, tmp_path: Path, tally: Tally, options: dict[str, Any]
) -> None:
    """Those too whose NaN is in tokens that were not to be kept."""
    config = replace(broken_teacher(break_a_token), **options)
    store = extract(config).store
    bad = [
        i for i, record in enumerate(store.records) if RARE in record["prompt"] + record["reasoning"] + record["answer"]
    ]
    assert 0 < len(bad) < store.num_samples
    assert store.complete
    assert store.excluded.tolist() == bad
    assert not any(verify_shards(store))
    kept = [i for i in range(store.num_samples) if i not in bad]
    assert KVReader(store).read(kept).isfinite().all()
    with pytest.raises(StoreError):
        KVReader(store).read(bad[:1])
    assert extract(config).teacher_tokens == 0
    record = distill(DistillConfig(mode="flat", max_steps=2, max_new_tokens=4), [store.path], tmp_path / "run")
    assert record["metrics"]["ce"] > 0
    tally.add("samples with NaN", tried=store.num_samples, injected=len(bad), detected=len(bad), lost=0)


def test_they_stop_the_extraction_where_asked(broken_teacher: MakeTeacher) -> None:
    config = broken_teacher(break_a_token)
    with pytest.raises(ModelError, match=r"KV of sample word-problems/.* is not finite"):
        extract(replace(config, on_nonfinite="stop"))
    store = KVStore.open(config.store)
    assert not store.complete
    assert not list(config.store.rglob("*.partial"))
    assert extract(config).store.complete


def test_numbers_too_large_for_float16_are_seen(broken_teacher: MakeTeacher, tmp_path: Path, tally: Tally) -> None:
    def enlarge(model: PreTrainedModel, _: PreTrainedTokenizerBase) -> None:
        model.base_model.layers[0].self_attn.v_proj.weight.mul_(1e6)

    store = extract(replace(broken_teacher(enlarge), dtype="float16")).store
    assert len(store.excluded) == store.num_samples
    tally.add(
        "float16 overflow", tried=store.num_samples, injected=store.num_samples, detected=store.num_samples, lost=0
    )
    with pytest.raises(StoreError, match="has no"):
        distill(DistillConfig(mode="flat", max_steps=2), [store.path], tmp_path / "run")


def test_a_run_that_diverges_is_no_result(broken_teacher: MakeTeacher, tmp_path: Path) -> None:
    store = extract(broken_teacher(lambda *_: None)).store
    for steps in (3, 15):
        config = DistillConfig(mode="none", learning_rate=1e9, max_steps=steps, max_new_tokens=4)
        with pytest.raises(DivergenceError, match=r"diverged at step \d+: .*Lower --learning-rate"):
            distill(config, [store.path], tmp_path / f"run{steps}")
        assert not (tmp_path / f"run{steps}" / "run.json").exists()
