"""Batches of one student's text with the KV of several teachers, each from its own store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .matched_stores import MatchedStore
from .teacher_batches import for_teacher
from .training_data import Batch, KVDataset

BATCH_AXIS = {"teacher_kv": 2}
"""Of a teacher's tensors; 0 of all others."""

STUDENT_TOKENS = {"kv_mask": 1, "time_index": 1, "time_weight": 1}
"""The axis of the student's tokens."""

TEACHER_TOKENS = {"teacher_kv": -2, "teacher_positions": 1}
"""The axis of the teacher's, which are the student's where no time map lies between them."""


class FusedDataset(Dataset[Batch]):
    """Indexed by whole batches of positions in the first store. A batch holds the student's side as a `KVDataset` has
    it, and every teacher's under its names with `.<number>` behind them.

    On samples that a store lacks its teacher's `kv_mask` is 0, and its tensors hold nothing.
    """

    def __init__(self, datasets: Sequence[KVDataset], stores: Sequence[MatchedStore]) -> None:
        self.datasets = list(datasets)
        self.text = self.datasets[0].text
        self._rows = [matched.rows for matched in stores]

    def __len__(self) -> int:
        return len(self.datasets[0])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = self.datasets[0].student(indices)
        for number, (dataset, rows) in enumerate(zip(self.datasets, self._rows, strict=True)):
            if dataset.reader is not None:
                own = self._teacher(dataset, rows, rows[np.asarray(indices)], batch["attention_mask"])
                batch |= for_teacher(number, own)
        return batch

    def _teacher(
        self, dataset: KVDataset, rows: np.ndarray, wanted: np.ndarray, attention_mask: Tensor
    ) -> dict[str, Tensor]:
        there = wanted >= 0
        places = np.flatnonzero(there)
        if not len(places):
            # Any sample lends its shapes, behind a mask that lets nothing through.
            places, wanted = np.array([0]), rows[rows >= 0][:1]
        own = dataset.teacher(wanted[places].tolist())
        size, width = attention_mask.shape
        axes = STUDENT_TOKENS if "time_index" in own else STUDENT_TOKENS | TEACHER_TOKENS
        own |= {name: _padded(own[name], axis, width) for name, axis in axes.items() if name in own}
        own = {name: _spread(tensor, BATCH_AXIS.get(name, 0), places, size) for name, tensor in own.items()}
        if not there.all():
            own["kv_mask"] = own.get("kv_mask", attention_mask) * torch.from_numpy(there.astype(np.int64))[:, None]
        return own


def _padded(tensor: Tensor, axis: int, width: int) -> Tensor:
    """With zeros behind what there is along an axis, or cut, up to `width`."""
    if tensor.shape[axis] >= width:
        return tensor.narrow(axis, 0, width)
    missing = list(tensor.shape)
    missing[axis] = width - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=axis)


def _spread(tensor: Tensor, axis: int, places: np.ndarray, size: int) -> Tensor:
    """Zeros for `size` samples, with those that there are at their places."""
    if len(places) == size:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = size
    return tensor.new_zeros(shape).index_copy_(axis, torch.from_numpy(places), tensor)
