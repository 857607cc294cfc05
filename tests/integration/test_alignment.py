"""Every way of laying a teacher onto a student, by the real command line: layers, tokens, key spaces, projections."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpipe.data.word_problems import generate
from kvpipe.kvcache.align.aligner import Aligner
from kvpipe.pipeline.monitor import ABSORBED_SHARE
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

LAYERS, HEADS, DIM = 2, 2, 24
TEACHER_LAYERS, TEACHER_HEADS, TEACHER_DIM = 4, 4, 32
FLAT, TERM = HEADS * DIM * TEACHER_HEADS * TEACHER_DIM, DIM * TEACHER_DIM + HEADS * TEACHER_HEADS
BIAS = TEACHER_HEADS * TEACHER_DIM

OTHER = ["--student", "other"]
TEACHER = ["--student", "teacher", "--mode", "identity", "--store", "exact.zarr"]
# A run of such steps ends where it starts.
STILL = ["--learning-rate", 1e-12]
WARMING = ["--mode", "flat", "--kv-loss", "mse,cka:0.1:0.5", "--epochs", 6, "--batch-size", 4, "--save-steps", 2]

HALF = ["--time-map", "segment", "--segment-ratio", "reasoning=0.5", "--segment-interpolation", "nearest"]
RUNS: dict[str, list[object]] = {
    "auto": OTHER,
    "span-mean": [*OTHER, "--time-map", "span-mean"],
    "segment": [*OTHER, "--time-map", "segment", "--key-space", "pre-rope"],
    "half a segment": [*OTHER, *HALF],
    "other evicted": [*OTHER, "--store", "evicted.zarr"],
    "other evicted segments": [*OTHER, "--store", "evicted.zarr", "--kv-segments", "reasoning,answer"],
    "evicted segments": ["--store", "evicted.zarr", "--kv-segments", "answer", "--key-space", "pre-rope"],
    "teacher post-rope": [*TEACHER, *STILL],
    "teacher pre-rope": [*TEACHER, *STILL, "--key-space", "pre-rope"],
    "teacher shuffled": [*TEACHER, *STILL, "--key-space", "pre-rope", "--kv-control", "shuffled"],
    "uniform": ["--layer-map", "uniform"],
    "cka": ["--layer-map", "cka"],
    "file": ["--layer-map", "map.json"],
    "random": ["--mode", "flat", *STILL],
    "closed-form": ["--mode", "flat", *STILL, "--start", "closed-form"],
    "terms random": ["--match-params", "flat", *STILL],
    "terms closed-form": ["--match-params", "flat", *STILL, "--start", "closed-form"],
    "frozen": ["--mode", "flat", "--direction", "teacher-to-student-frozen"],
    "frozen longer": ["--mode", "flat", "--direction", "teacher-to-student-frozen", "--max-steps", 4],
    "low rank": ["--mode", "flat", "--match-params", "structured"],
    "bottleneck": ["--mode", "bottleneck", "--match-params", "flat"],
    "structural": ["--kv-loss", "structural", "--store", "exact.zarr"],
    "relation": ["--kv-loss", "relation", "--mode", "identity"],
    "warming": [*WARMING, "--max-steps", -1],
}

REFUSED: dict[str, tuple[list[object], tuple[str, ...]]] = {
    "identity of other tokens": ([*OTHER, "--time-map", "identity"], ("different tokens", "--time-map")),
    "no queries": (["--kv-loss", "structural"], ("has no queries", "Extract again with --queries")),
    "attention of other tokens": (
        [*OTHER, "--kv-loss", "structural", "--store", "exact.zarr"],
        ("token by token", "found --time-map span-last"),
    ),
    "attention without rotation": (
        ["--kv-loss", "structural", "--key-space", "pre-rope", "--store", "exact.zarr"],
        ("expected post-rope with --kv-loss structural", "--key-space"),
    ),
    "attention of several layers": (
        ["--kv-loss", "structural", "--layer-map", "uniform", "--store", "exact.zarr"],
        ("layer by layer", "found means of several", "--layer-map ratio"),
    ),
    "a share of equal segments": (
        ["--time-map", "segment", "--segment-ratio", "reasoning=0.5"],
        ("segment_ratio: expected time_map segment and other tokens, or other texts", "found reasoning=0.5"),
    ),
    "equal segments, and the nearest token": (
        ["--time-map", "segment", "--segment-interpolation", "nearest"],
        ("segment_interpolation: expected time_map segment and other tokens", "found nearest"),
    ),
    "a share where nothing is stretched": (
        [*OTHER, "--segment-ratio", "reasoning=0.5"],
        ("segment_ratio: expected time_map segment and other tokens", "found reasoning=0.5"),
    ),
    "unequal shapes": (["--mode", "identity"], ("expected 4 KV heads of 32 channels, found 2 of 24", "relation")),
    "map of other shape": (["--layer-map", "wide.json"], ("the layer map does not fit", "2 layers from 0 to 3")),
    "map of other depth": (["--layer-map", "deep.json"], ("the layer map does not fit", "2 rows of 4 numbers")),
    "map that is no JSON": (["--layer-map", "torn.json"], ("torn.json is no layer map", "--layer-map")),
    "no map there": (["--layer-map", "gone.json"], ("gone.json cannot be read", "--layer-map")),
    "no such map": (["--layer-map", "diagonal"], ("expected ratio, skip, uniform, last, cka", "found diagonal")),
}

AGAIN = {"same.json": 0, '{"layers":[1.0,3.0]}': 0, "changed.json": 2, "deleted.json": 2}
"""Layer maps that the run `file` is asked for again with, when it is finished, and how that ends."""


# ---------------------------------------------------------------------- what the runs are made of


def _write_other_student(folder: Path) -> None:
    """A random student with weights of its own and a tokenizer of its own, which keeps numbers whole."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((sample.text for sample in generate("train", 40, 5)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _lay_out(folder: Path, kvpipe: Any, teacher: Path, store: Path) -> None:
    (folder / "teacher").symlink_to(teacher)
    (folder / "plain.zarr").symlink_to(store)
    _write_other_student(folder / "other")
    for name, document in {
        "map": {"layers": [1, 3]},
        "wide": {"layers": [1, 2, 3]},
        "deep": {"weights": [[0.5, 0.5], [0.0, 1.0]]},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    (folder / "same.json").write_text('{"layers":\n [1, 3.0]}\n')
    (folder / "changed.json").write_text('{"layers": [0, 3]}')
    (folder / "torn.json").write_text('{"layers": [1,')
    extract = ["extract", "--model", "teacher", "--samples", 24, "--eval-samples", 4]
    extracted = kvpipe.many(
        [
            [*extract, "--store", "evicted.zarr", "--evict", "random", "--budget", 0.5],
            [*extract, "--store", "exact.zarr", "--queries", "--dtype", "float32"],
        ],
        cwd=folder,
    )
    assert [outcome.code for outcome in extracted] == [0, 0], extracted


def _command(options: list[object], run: Path | str) -> list[object]:
    store = [] if "--store" in options else ["--store", "plain.zarr"]
    common = ["--batch-size", 8, "--max-steps", 2, "--max-new-tokens", 2]
    return ["distill", *store, *common, *options, "--output-dir", run]


@pytest.fixture(scope="session")
def workplace(built_once: Any, kvpipe: Any, teacher: Path, store: Path) -> Path:
    """A folder with all RUNS under `runs`, and `report.json` with how they, REFUSED and AGAIN ended."""

    def build(folder: Path) -> None:
        _lay_out(folder, kvpipe, teacher, store)
        commands = {name: _command(options, f"runs/{name}") for name, options in RUNS.items()}
        commands |= {name: _command(options, f"runs/{name}") for name, (options, _) in REFUSED.items()}
        commands |= {name: _command(["--layer-map", name], "runs/file") for name in AGAIN}
        outcomes = kvpipe.many(list(commands.values()), cwd=folder)
        report = {name: vars(outcome) for name, outcome in zip(commands, outcomes, strict=True)}
        (folder / "report.json").write_text(json.dumps(report))

    return built_once("alignment", build)


# ---------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_without_a_teacher(record_of: Any, name: str) -> None:
    record = record_of(name)
    assert record["teacher_forwards"] == 0
    assert record["collapsed"] is False
    metrics = record["metrics"]
    assert {"ce", "cka_key", "cka_value"} <= metrics.keys()
    assert ("nmse_key" in metrics) is (name != "relation")
    assert all(0 <= metrics[f"cka_{kind}"] <= 1 + 1e-6 for kind in ("key", "value"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(require_refused: Any, name: str) -> None:
    require_refused(name, REFUSED[name][1])


# ---------------------------------------------------------------------- tokens and key spaces


@pytest.mark.parametrize("name", ["auto", "span-mean", "segment", "other evicted"])
def test_a_student_with_a_tokenizer_of_its_own_keeps_it(workplace: Path, record_of: Any, name: str) -> None:
    record_of(name)
    own, saved, teachers = (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        for folder in (workplace / "other", workplace / "runs" / name / "student", workplace / "teacher")
    )
    assert saved == own
    assert saved != teachers


def test_every_time_map_is_another_target(record_of: Any) -> None:
    (read,) = record_of("auto")["stores"]
    assert 0 < read["one_to_one_share"] < read["token_coverage"] <= 1
    found = {record_of(name)["metrics"]["nmse_value"] for name in ("auto", "span-mean", "segment", "other evicted")}
    assert len(found) == 4


@pytest.mark.parametrize("key_space", ["post-rope", "pre-rope"])
def test_a_student_that_is_the_teacher_agrees_with_it(record_of: Any, key_space: str) -> None:
    """Its weights, its layers, its tokens: what is left is rounding."""
    metrics = record_of(f"teacher {key_space}")["metrics"]
    for kind in ("key", "value"):
        assert metrics[f"nmse_{kind}"] < 1e-6
        assert metrics[f"cosine_{kind}"] == pytest.approx(1, abs=1e-5)
        assert metrics[f"cka_{kind}"] == pytest.approx(1, abs=1e-5)


def test_what_has_nothing_to_train_absorbs_nothing(record_of: Any) -> None:
    record = record_of("teacher pre-rope")
    assert record["parameters"]["aligner"] == 0
    assert record["kv_gradient_share"] < ABSORBED_SHARE, "there is nothing to learn from oneself"
    assert not record["absorbed"]


def test_shuffling_is_for_training_alone(workplace: Path, record_of: Any) -> None:
    """A student that is the teacher sees it at once; what it is held against afterwards is not shuffled."""
    losses = {}
    for name in ("teacher pre-rope", "teacher shuffled"):
        assert record_of(name)["metrics"]["nmse_key"] < 1e-6
        lines = map(json.loads, (workplace / "runs" / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["eval_nmse_key"] for line in lines if "eval_nmse_key" in line]
    assert losses["teacher pre-rope"] == pytest.approx(losses["teacher shuffled"], abs=1e-6)
    assert record_of("teacher shuffled")["kv_gradient_share"] > 10 * record_of("teacher pre-rope")["kv_gradient_share"]


def test_evicted_tokens_and_chosen_segments_leave_less_to_compare(record_of: Any) -> None:
    (evicted,), (whole,) = (record_of(name)["stores"] for name in ("other evicted", "auto"))
    assert evicted["tokens_kept"] == pytest.approx(0.5, abs=0.05)
    assert evicted["token_coverage"] < 0.8 * whole["token_coverage"]
    assert evicted["one_to_one_share"] < whole["one_to_one_share"]
    found = {record_of(name)["metrics"]["nmse_key"] for name in ("other evicted", "other evicted segments", "auto")}
    assert len(found) == 3


# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("terms random", [[0, 1, 0, 0], [0, 0, 0, 1]]),
        ("uniform", [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        ("file", [[0, 1, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_a_run_leaves_the_layers_that_it_learned_from(
    workplace: Path, record_of: Any, name: str, expected: list[list[float]]
) -> None:
    record_of(name)
    assert json.loads((workplace / "runs" / name / "layer_map.json").read_text()) == {"weights": expected}


def test_the_map_by_cka_learns_from_two_layers_each(workplace: Path, record_of: Any) -> None:
    record_of("cka")
    rows = json.loads((workplace / "runs" / "cka" / "layer_map.json").read_text())["weights"]
    assert [len(row) for row in rows] == [TEACHER_LAYERS] * LAYERS
    for row in rows:
        assert sum(row) == pytest.approx(1)
        assert sum(weight > 0 for weight in row) == 2


def test_a_run_is_what_its_config_says_whatever_becomes_of_the_file(record_of: Any, outcome_of: Any) -> None:
    """The file's text is a part of it: in another file or on the command line it is the same run."""
    assert record_of("file")["config"]["layer_map"] in AGAIN
    assert {name: outcome_of(name)["code"] for name in AGAIN} == AGAIN
    for name in ("same.json", record_of("file")["config"]["layer_map"]):
        assert outcome_of(name)["stdout"] == outcome_of("file")["stdout"], "not a step, nor a second, is added"
    assert "config.layer_map differs" in outcome_of("changed.json")["stderr"]
    assert "deleted.json cannot be read" in outcome_of("deleted.json")["stderr"]


# ---------------------------------------------------------------------- projections


@pytest.mark.parametrize("mode", ["", "terms "], ids=["flat", "structured"])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_closed_form_start_fits_held_out_samples_better_than_a_random_one(
    record_of: Any, mode: str, kind: str
) -> None:
    """Before any training. The mean of every channel has an error of 1."""
    random, fitted = (record_of(f"{mode}{start}")["metrics"][f"nmse_{kind}"] for start in ("random", "closed-form"))
    assert fitted < 1 < random


def test_a_frozen_map_is_never_trained(workplace: Path, record_of: Any) -> None:
    runs = [workplace / "runs" / name for name in ("frozen", "frozen longer")]
    assert [record_of(run.name)["parameters"]["aligner"] for run in runs] == [0, 0]
    aligners = [load_file(run / "aligner.safetensors") for run in runs]
    assert aligners[0].keys() == aligners[1].keys() >= {"projection.bias", "projection.factors.0"}
    assert all(torch.equal(aligners[0][name], aligners[1][name]) for name in aligners[0])
    students = [load_file(run / "student" / "model.safetensors") for run in runs]
    assert not all(torch.equal(students[0][name], students[1][name]) for name in students[0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", LAYERS * 2 * (16 * TEACHER_DIM + HEADS * TEACHER_HEADS + BIAS)),
        ("uniform", LAYERS * 2 * (TERM + BIAS)),
        ("terms random", LAYERS * 2 * (FLAT // TERM * TERM + BIAS)),
        ("random", LAYERS * 2 * (FLAT + BIAS)),
        ("low rank", LAYERS * 2 * (TERM // (HEADS * DIM + BIAS) * (HEADS * DIM + BIAS) + BIAS)),
        ("relation", 0),
    ],
)
def test_a_record_tells_how_large_the_projection_was(record_of: Any, name: str, expected: int) -> None:
    assert record_of(name)["parameters"]["aligner"] == expected


@pytest.mark.parametrize("name", ["terms random", "bottleneck"])
def test_a_matched_projection_is_as_large_as_the_other_but_for_a_piece(record_of: Any, name: str) -> None:
    found, flat = (record_of(run)["parameters"]["aligner"] for run in (name, "random"))
    assert flat - LAYERS * 2 * TERM < found <= flat


@pytest.mark.parametrize("name", ["terms random", "low rank", "bottleneck", "frozen"])
def test_every_projection_loads_again(workplace: Path, record_of: Any, name: str) -> None:
    record_of(name)
    aligner = Aligner.load(workplace / "runs" / name)
    prediction, target = aligner(
        torch.zeros(LAYERS, 2, 1, HEADS, 3, DIM), torch.zeros(LAYERS, 2, 1, TEACHER_HEADS, 3, TEACHER_DIM)
    )
    assert prediction.shape == target.shape


# ---------------------------------------------------------------------- losses that warm up


def test_a_run_killed_while_a_loss_warms_up_ends_with_the_same_weights(
    workplace: Path, record_of: Any, kvpipe: Any, tmp_path: Path
) -> None:
    whole, expected, run = workplace / "runs" / "warming", record_of("warming"), tmp_path / "run"
    command = _command([*RUNS["warming"], "--store", workplace / "plain.zarr"], run)
    process = kvpipe.start(*command, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not any(run.glob("checkpoints/checkpoint-*/checkpoint.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert not (run / "run.json").exists()

    kvpipe(*command, cwd=tmp_path)
    record = json.loads((run / "run.json").read_text())
    assert expected["steps"] == record["steps"] == 36
    assert expected["resumed_from"] is None
    assert 0 < int(record["resumed_from"].removeprefix("checkpoint-")) < 18, "the warm-up takes half of the run"
    for file in ("student/model.safetensors", "aligner.safetensors", "predictions.jsonl"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert record["metrics"] == expected["metrics"]
