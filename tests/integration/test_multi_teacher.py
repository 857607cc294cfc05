"""Several teachers of one student, by the real command line: of other depths, heads, tokenizers, texts and samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpipe.data.word_problems import generate
from kvpipe.kvcache.align.aligner import Aligner
from kvpipe.pipeline.teacher_recipes import RECIPES, TeacherRecipe, new_model, train_tokenizer
from safetensors.torch import load_file
from transformers import AutoTokenizer

THREE = ["--store", "plain.zarr", "--store", "llama.zarr", "--store", "gpt2.zarr"]
HALF = ["--store", "plain.zarr", "--store", "half.zarr"]
EVICTED = ["--store", "plain.zarr", "--store", "evicted.zarr"]
ROUTER = ["--fusion", "learned", "--aligner-learning-rate", 0.5]

RUNS: dict[str, list[object]] = {
    "plain": ["--store", "plain.zarr"],
    "fixed": [*THREE, "--fusion-weights", "2,1,1"],
    "similarity": [*THREE, "--fusion", "similarity", "--fusion-prototypes", 4, "--fusion-per", "layer"],
    "learned": [*THREE, "--fusion", "learned", "--fusion-per", "token", "--router", "mlp", "--router-entropy", 0.1],
    "best-of": [*THREE, "--fusion", "best-of"],
    "averaged": [*THREE, "--direction", "teacher-to-student-frozen", "--fusion", "learned"],
    "half": HALF,
    "half first": [*HALF[2:], *HALF[:2]],
    "evicted": EVICTED,
    "shuffled": [*THREE, "--kv-control", "none,shuffled,random"],
    "no KV": [*HALF, "--mode", "none"],
    "collapsing": [*THREE, *ROUTER, "--router-entropy", -30, "--epochs", 20, "--max-steps", -1],
}

REFUSED: dict[str, tuple[list[object], tuple[str, ...]]] = {
    "other prompts": (["--store", "plain.zarr", "--store", "other.zarr"], ("not over the same prompts", "--seed")),
    "no sum": ([*HALF, "--fusion-weights", "0,0"], ("numbers of 0 or more with a positive sum, found 0,0",)),
    "negative": ([*HALF, "--fusion-weights", "2,-1"], ("numbers of 0 or more with a positive sum",)),
    "no numbers": ([*HALF, "--fusion-weights", "a,b"], ("numbers with commas", "found 'a,b'")),
    "other count": ([*HALF, "--fusion-weights", "1,2,3"], ("expected 2 numbers, one a store, found 1,2,3",)),
    "unknown fusion": ([*HALF, "--fusion", "mean"], ("fixed or similarity or learned or best-of", "found 'mean'")),
    "twice": (["--store", "plain.zarr", "--store", "./plain.zarr"], ("one store is named twice", "--fusion-weights")),
    "one store": (["--store", "plain.zarr", "--fusion", "learned"], ("expected several stores", "found learned")),
    "other option": ([*HALF, "--router", "mlp"], ("router: expected it with --fusion learned alone, found mlp",)),
    "no loss of tokens": ([*HALF, "--kv-loss", "mse,cka"], ("expected only mse, smooth-l1", "found mse,cka")),
    "no KV to fuse": (
        [*HALF, "--mode", "none", "--fusion", "learned"],
        ("one that uses KV with a fusion",),
    ),
    "controls": ([*THREE, "--kv-control", "none,shuffled"], ("one word, or 3: one a store",)),
    "identity": ([*THREE, "--time-map", "identity"], ("read different", "--time-map")),
    "spans of other text": ([*THREE, "--time-map", "span-mean"], ("read different text: expected auto or segment",)),
    "incomplete": (["--store", "plain.zarr", "--store", "nosuch.zarr"], ("no KV store at nosuch.zarr",)),
}


def _make_teacher(folder: Path, recipe: TeacherRecipe, layers: dict[str, int]) -> None:
    recipe = replace(recipe, shape={**recipe.shape, **layers})
    tokenizer = train_tokenizer(list(generate("train", 200, 0, "long")), recipe)
    torch.manual_seed(0)
    new_model(tokenizer, recipe).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def workplace(built_once: Any, kvpipe: Any, teacher: Path, store: Path) -> Path:
    """A folder with all RUNS under `runs`, and `report.json` with how they and REFUSED ended."""

    def build(folder: Path) -> None:
        (folder / "teacher").symlink_to(teacher)
        (folder / "plain.zarr").symlink_to(store)
        _make_teacher(folder / "a-llama", RECIPES["llama"], {"num_hidden_layers": 3})
        _make_teacher(folder / "a-gpt2", RECIPES["gpt2"], {"n_layer": 1})
        extract = ["extract", "--eval-samples", 4, "--model"]
        extractions: list[list[object]] = [
            [*extract, "a-llama", "--samples", 24, "--store", "llama.zarr"],
            [*extract, "a-gpt2", "--samples", 24, "--store", "gpt2.zarr", "--dataset", "word-problems-long"],
            [*extract, "teacher", "--samples", 12, "--store", "half.zarr"],
            [*extract, "teacher", "--samples", 24, "--store", "evicted.zarr", "--evict", "random", "--budget", 0.5],
            [*extract, "teacher", "--samples", 24, "--store", "other.zarr", "--seed", 5],
        ]
        common = ["distill", "--batch-size", 8, "--max-steps", 2, "--max-new-tokens", 2]
        asked = RUNS | {name: options for name, (options, _) in REFUSED.items()}
        runs = [[*common, *options, "--output-dir", f"runs/{name}"] for name, options in asked.items()]
        extracted = kvpipe.many(extractions, cwd=folder)
        assert [outcome.code for outcome in extracted] == [0] * len(extractions), extracted
        outcomes = kvpipe.many(runs, cwd=folder)
        report = {name: vars(outcome) for name, outcome in zip(asked, outcomes, strict=True)}
        (folder / "report.json").write_text(json.dumps(report))

    return built_once("multi-teacher", build)


def weights_of(record: dict[str, Any]) -> list[float]:
    return [record["metrics"][f"fusion_weight_{k}"] for k in range(len(record["stores"]))]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_without_a_teacher(record_of: Any, name: str) -> None:
    record = record_of(name)
    assert record["teacher_forwards"] == 0
    assert record["train_samples"] == (12 if name == "half first" else 24)
    assert record["common_samples"] == (12 if "half" in str(RUNS[name]) else 24)
    if len(record["stores"]) > 1 and name != "no KV":
        assert sum(weights_of(record)) == pytest.approx(1)
    assert (len(record["stores"]) > 1 and name != "no KV") is ("fusion_weight_0" in record["metrics"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(require_refused: Any, name: str) -> None:
    require_refused(name, REFUSED[name][1])


def test_teachers_differ_in_all_that_matters(workplace: Path) -> None:
    """Or nothing here would be shown of such that do."""
    kinds = {json.loads((workplace / name / "config.json").read_text())["model_type"] for name in ("a-llama", "a-gpt2")}
    assert kinds == {"llama", "gpt2"}
    cut = {
        name: len(AutoTokenizer.from_pretrained(workplace / name).tokenize("72"))
        for name in ("teacher", "a-llama", "a-gpt2")
    }
    assert cut == {"teacher": 2, "a-llama": 1, "a-gpt2": 2}


def test_every_teacher_has_an_aligner_and_a_layer_map(workplace: Path, record_of: Any) -> None:
    record_of("fixed")
    folders = [workplace / "runs" / "fixed" / f"teacher-{k}" for k in range(3)]
    aligners = [Aligner.load(folder) for folder in folders]
    assert [aligner.config.teacher.num_kv_heads for aligner in aligners] == [4, 2, 8]
    depths = [len(json.loads((folder / "layer_map.json").read_text())["weights"][0]) for folder in folders]
    assert depths == [4, 3, 1]


def test_weights_are_those_that_were_given(record_of: Any, outcome_of: Any) -> None:
    assert weights_of(record_of("fixed")) == pytest.approx([0.5, 0.25, 0.25], abs=0.02)
    assert "24 of 24 training samples are in all stores; weights: plain 0.5" in outcome_of("fixed")["stdout"]
    assert "12 of 24 training samples are in all stores" in outcome_of("half")["stdout"]
    assert "12 of 12 training samples" in outcome_of("half first")["stdout"]


def test_the_best_teacher_of_every_layer_is_told(record_of: Any) -> None:
    metrics = record_of("best-of")["metrics"]
    by_layer = [[metrics.get(f"fusion_weight_{k}_layer_{layer}") for k in range(3)] for layer in range(2)]
    if by_layer[0][0] is None:
        # The same one for both layers.
        assert sorted(weights_of(record_of("best-of")))[-1] > 0.9
    else:
        assert all(max(layer) > 0.9 for layer in by_layer)


def test_a_second_teacher_changes_what_the_student_becomes(workplace: Path, record_of: Any) -> None:
    found = {}
    for name in ("plain", "fixed", "half", "shuffled", "no KV"):
        record_of(name)
        found[name] = load_file(workplace / "runs" / name / "student" / "model.safetensors")["model.norm.weight"]
    assert len({tuple(weights.tolist()) for weights in found.values()}) == len(found)


def test_the_weights_of_the_teachers_are_logged(workplace: Path, record_of: Any) -> None:
    record_of("collapsing")
    lines = [
        json.loads(line) for line in (workplace / "runs" / "collapsing" / "metrics.jsonl").read_text().splitlines()
    ]
    logged = [line["fusion_weight_0"] for line in lines if "loss" in line]
    assert logged
    assert all(0 <= weight <= 1 for weight in logged)
    assert [sum(line[f"eval_fusion_weight_{k}"] for k in range(3)) for line in lines if "eval_ce" in line] == (
        pytest.approx([1.0] * sum("eval_ce" in line for line in lines))
    )


def test_a_router_that_collapses_to_one_teacher_is_reported(record_of: Any, outcome_of: Any) -> None:
    record = record_of("collapsing")
    assert record["router_collapsed"] is (max(weights_of(record)) > 0.95)
    assert record["router_collapsed"] is True
    assert "The router collapsed" in outcome_of("collapsing")["stderr"]
    assert record_of("learned")["router_collapsed"] is False
    assert record_of("best-of")["router_collapsed"] is False
