"""A distillation step with KV over a step with cross-entropy alone, and the share of it that waits for data.

Aims: <= 1.5 for the step, <= 0.02 for the wait.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.distill import distill
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from side_by_side import HEADER, Ratio, alternate, of_values, quiet, ratio

SAMPLES, STEPS, RUNS = 600, 100, 5
MODES = ("none", "flat", "structured")


def measure(runs: int = RUNS) -> list[Ratio]:
    """Step ratios for both modes, and the data wait of each."""
    waits: dict[str, list[float]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "bench.zarr"
        extract(ExtractConfig("qwen", store, samples=SAMPLES, eval_samples=8), quiet())

        def run(mode: str) -> float:
            config = DistillConfig(mode=mode, max_steps=STEPS)  # type: ignore[arg-type]
            record = distill(config, [store], Path(folder) / mode, overwrite=True, progress=quiet())
            waits[mode].append(record["data_wait_share"])
            return record["seconds"]["train"] / record["steps"]

        rounds = alternate({mode: lambda mode=mode: run(mode) for mode in MODES}, runs)  # type: ignore[misc]
    steps = [ratio(f"step, {mode} / none", rounds, mode, "none", aim=1.5) for mode in MODES[1:]]
    return steps + [of_values(f"data wait share, {mode}", waits[mode][1:], aim=0.02) for mode in MODES[1:]]


if __name__ == "__main__":
    print(HEADER, *(found.row for found in measure()), sep="\n")  # noqa: T201
