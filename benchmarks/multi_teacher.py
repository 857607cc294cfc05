"""What one, two and three teachers take of a student's step. From batches that lie in memory: the step over one without
a teacher, which is what aligners and losses cost. From the stores over from memory: what reading costs, which a thread
does meanwhile; and the share of the step that waits for it, the first batch left out.

`python benchmarks/multi_teacher.py`. `same tokens` are copies of one store; `built-in` are teachers with tokenizers and
texts of their own, which are laid onto the student's as well. Aims: half a step a teacher, <= 1.03 for reading, <= 0.02
for the wait.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from kvpipe.data.batching import ShuffledBatches
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.distiller import KVDistiller
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.fused_alignment import build_fused_distiller, fused_training_dataset
from kvpipe.pipeline.fused_dataset import FusedDataset
from kvpipe.pipeline.matched_stores import match_stores
from kvpipe.pipeline.models import load_student, tokenizer_from_files
from kvpipe.pipeline.read_ahead import ReadAhead
from kvpipe.pipeline.student_text import teachers_tokens
from kvpipe.pipeline.training_data import Batch, KVDataset
from side_by_side import HEADER, Ratio, alternate, of_values, quiet, ratio

SAMPLES, STEPS, BATCH_SIZE, RUNS = 1600, 100, 16, 5
DATASETS = {"qwen": "word-problems", "llama": "word-problems", "gpt2": "word-problems-long"}


class Steps:
    """So many steps of a student with the teachers of some stores, without any for `mode` none."""

    def __init__(self, mode: str, paths: list[Path]) -> None:
        config = DistillConfig(mode=mode, batch_size=BATCH_SIZE)  # type: ignore[arg-type]
        stores = [KVStore.open(path) for path in paths]
        text, train = teachers_tokens(stores[0]), stores[0].indices("train")
        student = load_student("tiny", tokenizer_from_files(stores[0].tokenizer_files()), random_init=True, seed=0)
        matched = match_stores(stores, text)
        self.distiller: KVDistiller = build_fused_distiller(config, matched, student, train.tolist())
        self.data: KVDataset | FusedDataset = fused_training_dataset(config, matched, train.tolist())
        self.batches = list(ShuffledBatches(train, text.length, BATCH_SIZE, 0, stores[0].layout.samples))[:STEPS]
        self.waits: list[float] = []

    def from_memory(self) -> float:
        """Seconds."""
        seconds, _ = self._train(iter([self.data.__getitems__(indices) for indices in self.batches]), lambda: 0.0)
        return seconds

    def from_stores(self) -> float:
        """Seconds; the share of them that was spent waiting goes to `waits`."""
        ahead = ReadAhead(iter(map(self.data.__getitems__, self.batches)))
        seconds, waited = self._train(ahead, lambda: ahead.waited)
        self.waits.append(waited / seconds)
        return seconds

    def _train(self, batches: Iterator[Batch], waited: Callable[[], float]) -> tuple[float, float]:
        """Seconds, and those of them that were waited, after the first batch."""
        optimizer = torch.optim.AdamW([p for p in self.distiller.parameters() if p.requires_grad], lr=1e-4)
        self._step(next(batches), optimizer)
        start, before = time.perf_counter(), waited()
        for batch in batches:
            self._step(batch, optimizer)
        return time.perf_counter() - start, waited() - before

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        self.distiller(**batch)["loss"].backward()
        optimizer.step()


def measure(runs: int = RUNS) -> list[Ratio]:
    """For both groups and every number of teachers."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        built_in = [_extracted(folder, model, dataset) for model, dataset in DATASETS.items()]
        copies = [built_in[0], *(_copied(built_in[0], folder / f"copy{number}.zarr") for number in (1, 2))]
        return [*_of_group("same tokens", copies, runs), *_of_group("built-in", built_in, runs)]


def _extracted(folder: Path, model: str, dataset: str) -> Path:
    store = folder / f"{model}.zarr"
    extract(ExtractConfig(model, store, dataset=dataset, samples=SAMPLES, eval_samples=8), quiet())
    return store


def _copied(store: Path, copy: Path) -> Path:
    shutil.copytree(store, copy)
    return copy


def _of_group(name: str, stores: list[Path], runs: int) -> list[Ratio]:
    counts = range(1, len(stores) + 1)
    steps = {count: Steps("flat", stores[:count]) for count in counts}
    timed = {"none": Steps("none", stores[:1]).from_memory}
    for count in counts:
        timed[f"memory {count}"], timed[f"stores {count}"] = steps[count].from_memory, steps[count].from_stores
    rounds = alternate(timed, runs)
    compare = partial(ratio, rounds=rounds)
    return [
        found
        for count in counts
        for found in (
            compare(f"step, {count} / none, {name}", over=f"memory {count}", under="none", aim=1 + count / 2),
            compare(
                f"from stores / from memory, {count}, {name}",
                over=f"stores {count}",
                under=f"memory {count}",
                aim=1.03,
            ),
            of_values(f"data wait share, {count}, {name}", steps[count].waits[1:], aim=0.02),
        )
    ]


if __name__ == "__main__":
    print(HEADER, *(found.row for found in measure()), sep="\n")  # noqa: T201
