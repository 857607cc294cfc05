"""What further teachers take of a student's step: the second and third over the first, and the share of the
step that waits for data.

`python benchmarks/multi_teacher.py`. `same tokens` are copies of one store, of which nothing but aligner, loss and
reading is added; `built-in` are teachers with tokenizers and texts of their own, which are laid onto the student's as
well. Aims: <= 1.1 for a teacher, <= 0.02 for the wait.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.distill import distill
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from side_by_side import HEADER, Ratio, alternate, of_values, quiet

SAMPLES, STEPS, RUNS = 600, 100, 5
DATASETS = {"qwen": "word-problems", "llama": "word-problems", "gpt2": "word-problems-long"}
COUNTS = (0, 1, 2, 3)


def measure(runs: int = RUNS) -> list[Ratio]:
    """For both groups, another teacher's cost and the data wait with three."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        built_in = [_extracted(folder, model, dataset) for model, dataset in DATASETS.items()]
        copies = [built_in[0], *(_copied(built_in[0], folder / f"copy{number}.zarr") for number in (1, 2))]
        return [*_of_group("same tokens", copies, folder, runs), *_of_group("built-in", built_in, folder, runs)]


def _extracted(folder: Path, model: str, dataset: str) -> Path:
    store = folder / f"{model}.zarr"
    extract(ExtractConfig(model, store, dataset=dataset, samples=SAMPLES, eval_samples=8), quiet())
    return store


def _copied(store: Path, copy: Path) -> Path:
    shutil.copytree(store, copy)
    return copy


def _of_group(name: str, stores: list[Path], folder: Path, runs: int) -> list[Ratio]:
    waits: list[float] = []

    def step(count: int) -> float:
        config = DistillConfig(mode="flat" if count else "none", max_steps=STEPS)
        record = distill(config, stores[: max(1, count)], folder / f"run{count}", overwrite=True, progress=quiet())
        if count == COUNTS[-1]:
            waits.append(record["data_wait_share"])
        return record["seconds"]["train"] / record["steps"]

    rounds = alternate({str(count): lambda count=count: step(count) for count in COUNTS}, runs)  # type: ignore[misc]
    costs = [
        of_values(
            f"a teacher of {count} / the first, {name}",
            [(r[str(count)] - r["1"]) / (count - 1) / (r["1"] - r["0"]) for r in rounds],
            aim=1.1,
        )
        for count in COUNTS[2:]
    ]
    return [*costs, of_values(f"data wait share, 3 teachers, {name}", waits[1:], aim=0.02)]


if __name__ == "__main__":
    print(HEADER, *(found.row for found in measure()), sep="\n")  # noqa: T201
