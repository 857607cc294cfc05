"""A distillation step with KV over a step with cross-entropy alone, a step from lossy stores over one from raw KV, and
the share of each that waits for data; the wait also for a 0.5B-shaped student of such a teacher, with random weights.

Aims: <= 1.5 for the step, <= 1.03 for a lossy store beside raw KV, <= 0.01 for the wait.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from kvpipe.pipeline.config import DistillConfig, DistillMode
from kvpipe.pipeline.distill import distill
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.models import load_tokenizer
from shapes import QWEN_05B
from side_by_side import HEADER, Ratio, alternate, of_values, quiet, ratio
from transformers import Qwen2ForCausalLM

SAMPLES, STEPS, RUNS = 600, 100, 7
LARGE_SAMPLES, LARGE_STEPS, LARGE_RUNS = 64, 8, 2
MODES: tuple[DistillMode, ...] = ("none", "flat", "structured")
CODECS = ("raw", "int8", "int4")


def measure(runs: int = RUNS) -> list[Ratio]:
    """Step ratios for both modes and all stores, and the data wait of each."""
    waits: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        stores = {codec: Path(folder) / codec for codec in CODECS}
        for codec, store in stores.items():
            extract(ExtractConfig("qwen", store, samples=SAMPLES, eval_samples=8, codec=codec), quiet())
        recipes = {mode: DistillConfig(mode=mode, max_steps=STEPS) for mode in MODES}
        timed = {mode: _run(stores["raw"], recipe, waits[mode]) for mode, recipe in recipes.items()}
        timed |= {codec: _run(stores[codec], recipes["flat"], waits[codec]) for codec in CODECS[1:]}
        rounds = alternate(timed, runs)
    steps = [ratio(f"step, {mode} / none", rounds, mode, "none", aim=1.5) for mode in MODES[1:]]
    steps += [ratio(f"step, flat from {codec} / from raw", rounds, codec, "flat", aim=1.03) for codec in CODECS[1:]]
    return steps + [of_values(f"data wait share, {name}", waits[name][1:], aim=0.01) for name in list(timed)[1:]]


def measure_large() -> list[Ratio]:
    """The data wait of a 0.5B-shaped student, from raw KV and from four bits."""
    waits: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "qwen2.5-0.5b-shape"
        Qwen2ForCausalLM._from_config(QWEN_05B, dtype=torch.float32).save_pretrained(model)
        load_tokenizer("qwen").save_pretrained(model)
        kept = {"samples": LARGE_SAMPLES, "eval_samples": 8}
        student = {"student": str(model), "random_init": True, "max_new_tokens": 1}
        recipe = DistillConfig(mode="flat", batch_size=8, max_steps=LARGE_STEPS, **student)  # type: ignore[arg-type]
        timed = {}
        for codec in ("raw", "int4"):
            store = Path(folder) / codec
            extract(ExtractConfig(str(model), store, codec=codec, **kept), quiet())
            timed[codec] = _run(store, recipe, waits[codec])
        alternate(timed, LARGE_RUNS)
    return [of_values(f"data wait share, 0.5B, flat from {codec}", waits[codec][1:], aim=0.01) for codec in timed]


def _run(store: Path, recipe: DistillConfig, waits: list[float]) -> Callable[[], float]:
    """Seconds a step; the share of them that waited is added to `waits`."""

    def run() -> float:
        record = distill(recipe, [store], store.parent / "run", overwrite=True, progress=quiet())
        waits.append(record["data_wait_share"])
        return float(record["seconds"]["train"] / record["steps"])

    return run


if __name__ == "__main__":
    print(HEADER)  # noqa: T201
    for measured in (measure, measure_large):
        print(*(found.row for found in measured()), sep="\n", flush=True)  # noqa: T201
