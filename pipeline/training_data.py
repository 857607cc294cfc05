"""Batches for stage two, straight from the store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..data.sample import Segment
from ..kvcache.layout import take_tokens
from ..kvcache.reader import KVReader
from ..kvcache.store import KVStore
from .losses import IGNORED
from .student_text import StudentText, teachers_tokens
from .token_alignment import TokenAlignment

Batch = dict[str, Tensor]

TEACHERS = {"teacher_kv", "teacher_queries"}
"""What a batch holds of every token of the teacher's."""


class KVDataset(Dataset[Batch]):
    """Indexed by whole batches: a list of positions in the store gives one padded batch.

    A batch holds `input_ids`, `attention_mask`, `labels` (`[B, T]`; the prompt is read, not learned) and, with
    `with_kv`:

    - `teacher_kv` `[L, 2, B, H, K, D]`, and with `with_queries` `teacher_queries` `[L, B, Hq, K, D]`;
    - `teacher_positions` `[B, K]`, where they are not 0, 1, 2, ...: the position of every teacher token in its text;
    - `kv_positions` `[B, K]`, where the store evicts some tokens: the student's counterparts, -1 past the last;
    - `time_index` and `time_weight` `[B, T, *]`, where student and teacher read different tokens: see `TimeMap`;
    - `kv_mask` `[B, T]`, where `segments` leaves some out: 1 on the student's tokens whose KV is compared.

    `shuffle_seed` permutes every sample's teacher KV in time, the same way each epoch: the control that keeps all of
    the target but its place.
    """

    def __init__(
        self,
        store: KVStore,
        text: StudentText | None = None,
        *,
        with_kv: bool,
        with_queries: bool = False,
        time_map: str = "identity",
        segments: Sequence[Segment] | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        self.store = store
        self.text = text or teachers_tokens(store)
        self.reader = KVReader(store) if with_kv else None
        self.with_queries = with_queries
        self.alignment = TokenAlignment(store, self.text, time_map) if time_map != "identity" else None
        self.segments = segments
        self.shuffle_seed = shuffle_seed

    def __len__(self) -> int:
        return self.store.num_samples

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = np.asarray(indices)
        width = int(self.text.length[rows].max())
        segments = self.text.segment_ids[rows, :width]
        input_ids = self.text.input_ids[rows, :width].astype(np.int64)
        learned = (segments != Segment.PADDING) & (segments != Segment.PROMPT)
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy((segments != Segment.PADDING).astype(np.int64)),
            "labels": torch.from_numpy(np.where(learned, input_ids, IGNORED)),
        }
        return batch if self.reader is None else batch | self._teacher(self.reader, indices, segments)

    def _teacher(self, reader: KVReader, indices: Sequence[int], segments: NDArray[np.int8]) -> Batch:
        kv, positions = reader.read_with_positions(indices)
        batch = {"teacher_kv": kv}
        if self.with_queries:
            batch["teacher_queries"] = reader.read_queries(indices)
        if self.alignment is not None:
            time_map = self.alignment.of(indices, positions)
            batch |= {"time_index": time_map.index, "time_weight": time_map.weight}
        elif positions is not None:
            batch["kv_positions"] = positions
        if self.segments is not None:
            batch["kv_mask"] = torch.from_numpy(np.isin(segments, self.segments).astype(np.int64))
        if self.shuffle_seed is not None:
            order = self._order(indices, kv.shape[4], self.shuffle_seed)
            batch |= {name: take_tokens(batch[name], order) for name in TEACHERS & batch.keys()}
            positions = order if positions is None else positions.gather(1, order)
        if positions is not None:
            batch["teacher_positions"] = positions
        return batch

    def _order(self, indices: Sequence[int], width: int, seed: int) -> Int[Tensor, "B K"]:
        """Where every teacher token is taken from: anywhere in its sample."""
        order = torch.arange(width).repeat(len(indices), 1)
        for row, index in enumerate(indices):
            length = int(self.store.kv_length[index])
            permutation = np.random.default_rng([seed, index]).permutation(length)
            order[row, :length] = torch.from_numpy(permutation)
        return order
