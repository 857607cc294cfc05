"""R runs from the store against R runs with the teacher in the loop: T + R * S over R * S_online.

The online run is the same trainer over the same batches; only the dataset differs: it asks the teacher for
each batch. Aim: below 1 from the second run on.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kvpipe.kvcache.layout import stack_past_kv
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline import alignment as alignment_module
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.distill import distill
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.models import in_fast_arithmetic, load_teacher
from kvpipe.pipeline.student_text import StudentText
from kvpipe.pipeline.teacher_pass import capture_kv
from kvpipe.pipeline.training_data import Batch, KVDataset
from side_by_side import HEADER, Ratio, alternate, of_values, quiet

SAMPLES, EPOCHS, RUNS = 600, 4.0, 3


class LiveTeacherDataset(KVDataset):
    """The same batches, with the teacher's KV computed on the spot instead of read."""

    teacher = None

    def __init__(self, store: KVStore, text: StudentText, *, with_kv: bool, **options: Any) -> None:
        super().__init__(store, text, with_kv=with_kv, **options)
        if LiveTeacherDataset.teacher is None:
            teacher = load_teacher("qwen", dtype="auto", device=torch.device("cpu"))
            LiveTeacherDataset.teacher = in_fast_arithmetic(teacher)

    @torch.no_grad()  # not inference mode: the aligner's backward needs these tensors
    def __getitems__(self, indices: Sequence[int]) -> Batch:
        reader, self.reader = self.reader, None
        batch = super().__getitems__(indices)
        self.reader = reader
        if reader is not None:
            batch["teacher_kv"] = stack_past_kv(capture_kv(self.teacher, batch["input_ids"], batch["attention_mask"]))
        return batch


def measure(runs: int = RUNS) -> list[Ratio]:
    """Offline over online seconds for 1, 2, 3 and 6 runs."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "bench.zarr"
        start = time.perf_counter()
        extract(ExtractConfig("qwen", store, samples=SAMPLES, eval_samples=8), quiet())
        teacher_seconds = time.perf_counter() - start

        def run(dataset: type[KVDataset]) -> float:
            alignment_module.KVDataset = dataset  # type: ignore[misc]
            config = DistillConfig(mode="flat", epochs=EPOCHS)
            record = distill(config, [store], Path(folder) / "run", overwrite=True, progress=quiet())
            return record["seconds"]["setup"] + record["seconds"]["train"]

        rounds = alternate({"offline": lambda: run(KVDataset), "online": lambda: run(LiveTeacherDataset)}, runs)
    return [
        of_values(
            f"offline / online total, {count} run{'s' if count > 1 else ''}",
            [(teacher_seconds + count * r["offline"]) / (count * r["online"]) for r in rounds],
            aim=1.0,
        )
        for count in (1, 2, 3, 6)
    ]


if __name__ == "__main__":
    print(HEADER, *(found.row for found in measure()), sep="\n")  # noqa: T201
