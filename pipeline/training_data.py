"""Batches for stage two, straight from the store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.sample import Segment
from ..kvcache.layout import KV
from ..kvcache.reader import KVReader
from ..kvcache.store import KVStore
from .losses import IGNORED

Batch = dict[str, Tensor]


class KVDataset(Dataset[Batch]):
    """Indexed by whole batches: a list of positions in the store gives one padded batch.

    A batch holds `input_ids`, `attention_mask`, `labels` (`[B, T]`; the prompt is read, not learned) and,
    with `with_kv`, `teacher_kv` `[L, 2, B, H, K, D]`, of all tokens or, where the store evicts some, of those at
    `kv_positions` `[B, K]` (-1 past the last). `shuffle_seed` permutes every sample's teacher KV in time,
    the same way each epoch: the control that keeps all of the target but its place.
    """

    def __init__(self, store: KVStore, *, with_kv: bool, shuffle_seed: int | None = None) -> None:
        self.store = store
        self.reader = KVReader(store) if with_kv else None
        self.shuffle_seed = shuffle_seed

    def __len__(self) -> int:
        return self.store.num_samples

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = np.asarray(indices)
        lengths = self.store.length[rows]
        width = int(lengths.max())
        segments = self.store.segment_ids[rows, :width]
        input_ids = self.store.input_ids[rows, :width].astype(np.int64)
        learned = (segments != Segment.PADDING) & (segments != Segment.PROMPT)
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy((segments != Segment.PADDING).astype(np.int64)),
            "labels": torch.from_numpy(np.where(learned, input_ids, IGNORED)),
        }
        if self.reader is not None:
            kv, positions = self.reader.read_with_positions(indices)
            batch["teacher_kv"] = self._permuted(indices, kv)
            if positions is not None:
                batch["kv_positions"] = positions
        return batch

    def _permuted(self, indices: Sequence[int], kv: KV) -> KV:
        if self.shuffle_seed is None:
            return kv
        permuted = kv.clone()
        for row, index in enumerate(indices):
            length = int(self.store.kv_length[index])
            order = np.random.default_rng([self.shuffle_seed, index]).permutation(length)
            permuted[:, :, row, :, :length] = kv[:, :, row].index_select(3, torch.from_numpy(order))
        return permuted


def teacher_moments(
    store: KVStore, indices: Sequence[int], max_samples: int = 256, batch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[L, 2, 1, H, 1, D]` of every channel over the real tokens of some samples.

    The first `max_samples` of `indices` are read: a channel's moments settle within a few thousand tokens.
    """
    reader, chosen = KVReader(store), [int(i) for i in indices[:max_samples]]
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for start in range(0, len(chosen), batch_size):
        batch = chosen[start : start + batch_size]
        # Tokens past a sample's end are zero in the store, so they add nothing to either sum.
        kv = reader.read(batch).double()
        count += int(store.kv_length[batch].sum())
        total = total + kv.sum(dim=(2, 4), keepdim=True)
        squares = squares + kv.square().sum(dim=(2, 4), keepdim=True)
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    return mean.float(), variance.sqrt().float()
