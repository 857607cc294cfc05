"""The spine: extract once, inspect, distil every arm from the store."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from kvpipe.kvcache.align.aligner import Aligner
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

SAMPLES, STEPS = 32, 30
ARMS = ["structured", "flat", "none", "flat-shuffled"]
STUDENT_LAYERS, STUDENT_HEADS, STUDENT_DIM = 2, 2, 24
TEACHER_LAYERS, TEACHER_HEADS, TEACHER_DIM = 4, 4, 32
BIAS = STUDENT_LAYERS * 2 * TEACHER_HEADS * TEACHER_DIM
ALIGNER_PARAMETERS = {
    "none": 0,
    "flat": STUDENT_LAYERS * 2 * STUDENT_HEADS * STUDENT_DIM * TEACHER_HEADS * TEACHER_DIM + BIAS,
    "structured": STUDENT_LAYERS * 2 * (STUDENT_DIM * TEACHER_DIM + STUDENT_HEADS * TEACHER_HEADS) + BIAS,
}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------- the store


def test_inspect_tells_what_is_in_the_store(kvpipe: Any, store: Path) -> None:
    summary = json.loads(kvpipe("inspect", store, "--json", cwd=store.parent).stdout)
    assert summary["complete"] is True
    assert summary["shards"]["finished"] == summary["shards"]["total"] > 1
    assert summary["samples"] == {"train": 24, "validation": 4, "test": 4}
    shape = summary["shape"]
    assert (shape["layer"], shape["kv"], shape["sample"]) == (TEACHER_LAYERS, 2, SAMPLES)
    assert (shape["head"], shape["channel"]) == (TEACHER_HEADS, TEACHER_DIM)
    assert shape["token"] % 32 == 0
    assert summary["dtype"] == "bfloat16"
    assert summary["raw_bytes_per_token_of_kv"] == TEACHER_LAYERS * 2 * TEACHER_HEADS * TEACHER_DIM * 2
    files = [file for file in store.rglob("*") if file.is_file()]
    assert summary["bytes_on_disk"] == sum(file.stat().st_size for file in files)
    assert summary["extraction"]["tokens"] == summary["tokens"]
    assert summary["manifest"]["teacher"]["name"] == "teacher"
    assert summary["manifest"]["key_position"] == "post-rope"


@torch.inference_mode()
def test_plain_zarr_reads_what_dynamic_cache_holds(store: Path, teacher: Path) -> None:
    """Batched, padded and captured without copies, the stored KV is that of each sample run alone."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    group = zarr.open(store, mode="r")
    bits, lengths = group["kv"][...], group["length"][...]
    assert group["kv"].attrs["logical_dtype"] == "bfloat16"
    records = [json.loads(line) for line in group["text"][...].tobytes().splitlines()]
    for row, record in enumerate(records):
        text = f"{record['prompt']}\n{record['reasoning']}\n#### {record['answer']}"
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert group["input_ids"][row, : lengths[row]].tolist() == ids
        cache = DynamicCache()
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        expected = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
        stored = torch.from_numpy(bits[:, :, row]).view(torch.bfloat16).float()
        # Where the CPU has instructions for it, the teacher computes in bfloat16's 8 bits, layer by layer.
        torch.testing.assert_close(stored[..., : len(ids), :], expected, rtol=0.05, atol=0.03)
        assert not stored[..., len(ids) :, :].any()


def test_the_snippet_in_the_readme_reads_the_store(
    store: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / "qwen.zarr").symlink_to(store)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet, names)
    length = int(zarr.open(store, mode="r")["length"][7])
    assert names["kv"].dtype == torch.bfloat16
    assert names["kv"].shape == (TEACHER_LAYERS, 2, TEACHER_HEADS, length, TEACHER_DIM)
    assert names["kv"].float().abs().amin(dim=(0, 1, 2, 4)).shape == (length,)
    assert "bfloat16" in capsys.readouterr().out


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_leaves_its_record(run_of: Callable[[str], Path], store: Path, arm: str) -> None:
    run = run_of(arm)
    record = json.loads((run / "run.json").read_text())
    assert not (store.parent.parent / "teacher").exists(), "distilled with the teacher's folder deleted"
    assert record["teacher_forwards"] == 0
    assert record["steps"] == STEPS
    assert record["collapsed"] is False
    assert record["resumed_from"] is None
    assert (record["config"]["kv_control"] == "shuffled") is (arm == "flat-shuffled")
    assert record["parameters"]["aligner"] == ALIGNER_PARAMETERS[arm.removesuffix("-shuffled")]
    assert record["parameters"]["student"] > 100_000
    seconds = record["seconds"]
    assert all(seconds[part] > 0 for part in ("setup", "train", "data_wait", "evaluation"))
    assert seconds["total"] == pytest.approx(seconds["setup"] + seconds["train"] + seconds["evaluation"], rel=0.05)
    assert record["data_wait_share"] == pytest.approx(seconds["data_wait"] / seconds["train"])
    assert 0 < record["data_wait_share"] < 1
    metrics = record["metrics"]
    assert metrics["ce"] > 0
    assert {"exact_match", "token_accuracy", "cka_key", "cka_value"} <= metrics.keys()
    assert ("nmse_key" in metrics) is (arm != "none")
    assert (run / "aligner.safetensors").exists() is (arm != "none")


def test_the_arms_of_a_seed_are_paired(run_of: Callable[[str], Path]) -> None:
    records = [json.loads((run_of(arm) / "run.json").read_text()) for arm in ARMS]
    pairings = [record["pairing"] for record in records]
    assert set(pairings[0]) == {"student_init", "data_order", "eval_samples"}
    assert all(pairing == pairings[0] for pairing in pairings)
    assert len({record["parameters"]["student"] for record in records}) == 1
    assert len({record["stores"][0]["manifest"] for record in records}) == 1
    assert len({record["metrics"]["ce"] for record in records}) == len(ARMS), "every arm trained in its own way"


@pytest.mark.parametrize("arm", ["structured", "none"])
def test_metrics_are_logged_with_their_steps(run_of: Callable[[str], Path], arm: str) -> None:
    run = run_of(arm)
    logs = _lines(run / "metrics.jsonl")
    assert [entry["step"] for entry in logs if "eval_ce" in entry] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert [entry["step"] for entry in logs if "loss" in entry] == [10, 20, 30]
    losses = next(entry for entry in logs if "loss" in entry)
    assert ("kv" in losses) is (arm != "none")
    kv = losses.get("kv", 0.0)
    assert losses["loss"] == pytest.approx(losses["ce"] + kv, rel=1e-3)
    final = json.loads((run / "run.json").read_text())["metrics"]
    last = [entry for entry in logs if "eval_ce" in entry][-1]
    assert last["eval_ce"] == pytest.approx(final["ce"], rel=1e-6)


def test_the_student_loads_without_kvpipe_and_says_what_the_run_recorded(
    run_of: Callable[[str], Path], store: Path
) -> None:
    run = run_of("structured")
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    predictions = _lines(run / "predictions.jsonl")
    assert [line["id"] for line in predictions] == [f"word-problems/test/{i:06d}" for i in range(4)]
    group = zarr.open(store, mode="r")
    records = {r["id"]: r for r in map(json.loads, group["text"][...].tobytes().splitlines())}
    prompt = tokenizer(f"{records[predictions[0]['id']]['prompt']}\n", return_tensors="pt")
    generated = student.generate(**prompt, do_sample=False, max_new_tokens=8)
    text = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == predictions[0]["generated"]
    assert predictions[0]["exact"] is False
    ce = json.loads((run / "run.json").read_text())["metrics"]["ce"]
    assert np.mean([line["ce"] for line in predictions]) == pytest.approx(ce, rel=0.1)


@pytest.mark.parametrize("arm", ["structured", "flat"])
def test_the_aligner_loads_again(run_of: Callable[[str], Path], arm: str) -> None:
    aligner = Aligner.load(run_of(arm))
    assert sum(p.numel() for p in aligner.parameters()) == ALIGNER_PARAMETERS[arm]
    student = torch.zeros(STUDENT_LAYERS, 2, 1, STUDENT_HEADS, 3, STUDENT_DIM)
    teacher = torch.zeros(STUDENT_LAYERS, 2, 1, TEACHER_HEADS, 3, TEACHER_DIM)
    prediction, target = aligner(student, teacher)
    assert prediction.shape == target.shape == (STUDENT_LAYERS, 2, 1, TEACHER_HEADS, 3, TEACHER_DIM)


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_holds_safetensors_and_json_only(run_of: Callable[[str], Path], arm: str) -> None:
    suffixes = {file.suffix for file in run_of(arm).rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".jinja", ".txt"}


# ---------------------------------------------------------------------- as a newcomer types it


def test_the_commands_of_the_readme_find_each_other(kvpipe: Any, tmp_path: Path) -> None:
    """The built-in teacher and student, and every place by default."""
    models, extract, distill, inspect = kvpipe.many(
        [
            ["models"],
            ["extract", "--model", "qwen", "--samples", 24, "--eval-samples", 4],
            ["distill", "--mode", "structured", "--max-steps", 2],
            ["inspect", "stores/qwen.zarr"],
        ],
        cwd=tmp_path,
    )
    assert {outcome.code for outcome in (models, extract, distill, inspect)} == {0}, (extract, distill)
    assert [line.split()[:2] for line in models.stdout.splitlines()] == [
        ["gpt2", "teacher"],
        ["llama", "teacher"],
        ["qwen", "teacher"],
        ["tiny", "student"],
    ]
    assert extract.stdout.startswith("stores/qwen.zarr: 32 samples")
    assert distill.stdout.startswith("runs/structured-seed0: ce ")
    assert "word-problems" in inspect.stdout
    assert (tmp_path / "runs" / "structured-seed0" / "student" / "model.safetensors").exists()


# ---------------------------------------------------------------------- the same again


def test_a_repeated_command_repeats_no_work(
    kvpipe: Any, store: Path, teacher: Path, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also: other options into the same folder are refused by name, and --overwrite replaces a run, nothing else."""
    shutil.copytree(run_of("flat"), tmp_path / "run")
    shutil.copytree(teacher, tmp_path / "model")
    folders = (store, tmp_path / "run", tmp_path / "model")
    before = [_contents(folder) for folder in folders]
    distill = ["distill", "--mode", "flat", "--batch-size", 4, "--epochs", 5, "--max-new-tokens", 8, "--store", store]
    to_run, to_model = ["--output-dir", tmp_path / "run"], ["--output-dir", tmp_path / "model"]
    extraction = ["--samples", 24, "--eval-samples", 4, "--store", store]
    again, finished, refused, model, replaced, overwritten = kvpipe.many(
        [
            ["extract", "--model", teacher, *extraction],
            [*distill, *to_run],
            [*distill, *to_run, "--learning-rate", 0.003],
            [*distill, *to_model, "--overwrite"],
            [*distill, *to_run, "--overwrite", "--student", "nosuch"],
            [*distill, *to_run, "--overwrite", "--max-steps", 1],
        ],
        cwd=tmp_path,
    )
    assert again.code == 0
    assert "already complete; the teacher had nothing to do" in again.stdout
    assert finished.code == 0
    assert "30 steps" in finished.stdout
    assert finished.seconds < 2
    assert refused.code == 2
    assert refused.error_lines == [
        f"Error: {tmp_path / 'run'} holds another run (config.learning_rate differs): expected 0.003, found 0.001. "
        "Choose another folder (--output-dir, of an experiment --runs-dir), or delete this one "
        "(`distill --overwrite` does)"
    ]
    assert model.code == 2
    assert "is not a run directory" in model.stderr
    assert replaced.code == 2, "a run is not given up for one that cannot begin"
    assert overwritten.code == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 1
    after = [_contents(folder) for folder in folders]
    assert after[0] == before[0]
    assert after[2] == before[2]


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.stat().st_size)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
