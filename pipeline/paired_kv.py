"""Both sides' KV of the same tokens, before any training: what maps are fitted to and profiles are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .distiller import KVDistiller
from .training_data import Batch, KVDataset

FIT_SAMPLES = 256
"""Of the training samples, for whatever is computed before training: moments settle within a few thousand tokens."""

BATCH = 16


@dataclass(frozen=True)
class PairedKV:
    """One batch: the student's KV `[Ls, 2, B, Hs, T, Ds]`, the teacher's as the distiller's view lays it
    `[L, 2, B, Ht, T, Dt]`, and a mask `[B, T]` of the tokens that both have."""

    student: Float[Tensor, "Ls 2 B Hs T Ds"]
    teacher: Shaped[Tensor, "L 2 B Ht T Dt"]
    mask: Int[Tensor, "B T"]


def batches(dataset: KVDataset, indices: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
    """The samples at `indices`, batch by batch: their places, and what the dataset gives of them."""
    for start in range(0, len(indices), BATCH):
        rows = [int(index) for index in indices[start : start + BATCH]]
        yield rows, dataset.__getitems__(rows)


@torch.no_grad()
def paired_kv(distiller: KVDistiller, dataset: KVDataset, indices: Sequence[int]) -> Iterator[PairedKV]:
    """Batches of the samples at `indices` and of the distiller's only teacher, with the student as it is now, on the
    student's device."""
    training, device = distiller.training, distiller.student.device
    distiller.eval()
    try:
        for _, read in batches(dataset, indices):
            batch = {name: tensor.to(device) for name, tensor in read.items()}
            _, student_kv = distiller.student_forward(batch["input_ids"], batch["attention_mask"])
            student = distiller.teacher.student_side(student_kv, batch)
            yield PairedKV(student, *distiller.teacher.teacher_side(batch))
    finally:
        distiller.train(training)
