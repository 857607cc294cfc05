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

STUDENT_TOKENS = ("kv_mask", "time_index", "time_weight")
"""Whose second axis is that of the student's tokens."""


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
        # Of none of them: any sample lends its shapes, behind a mask that lets nothing through.
        places = np.flatnonzero(there) if there.any() else np.array([0])
        own = dataset.teacher((wanted[places] if there.any() else rows[rows >= 0][:1]).tolist())
        size, width = attention_mask.shape
        if "time_index" not in own:
            own["teacher_kv"] = _padded(own["teacher_kv"], -2, width)
            own |= {name: _padded(own[name], 1, width) for name in ("teacher_positions",) if name in own}
        own |= {name: _padded(own[name], 1, width) for name in STUDENT_TOKENS if name in own}
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
