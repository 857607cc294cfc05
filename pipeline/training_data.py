"""Batches for stage two, straight from the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..data.sample import Segment
from ..kvcache.align.time_warp import Coverage, SampleMap, segment_map
from ..kvcache.reader import KVReader
from ..kvcache.store import KVStore
from .kv_controls import KVControl
from .losses import IGNORED
from .student_text import StudentText, teachers_tokens
from .token_alignment import TokenAlignment

Batch = dict[str, Tensor]


class KVDataset(Dataset[Batch]):
    """Indexed by whole batches: a list of positions in the store gives one padded batch.

    A batch holds `input_ids`, `attention_mask`, `labels` (`[B, T]`; the prompt is read, not learned) and, with
    `with_kv`:

    - `teacher_kv` `[L, 2, B, H, K, D]`, and with `with_queries` `teacher_queries` `[L, B, Hq, K, D]`;
    - `teacher_positions` `[B, K]`, where they are not 0, 1, 2, ...: the position of every teacher token in its text;
    - `kv_positions` `[B, K]`, where the store evicts some tokens: the student's counterparts, -1 past the last;
    - `time_index` and `time_weight` `[B, T, *]`, where student and teacher read different tokens: see `TimeMap`;
    - `kv_mask` `[B, T]`, where `segments` leaves some out: 1 on the student's tokens whose KV is compared.

    A `control` changes the teacher's side of every batch: see `KVControl`.
    """

    def __init__(
        self,
        store: KVStore,
        text: StudentText | None = None,
        *,
        with_kv: bool,
        with_queries: bool = False,
        time_map: str = "identity",
        stretch: Callable[..., SampleMap] = segment_map,
        segments: Sequence[Segment] | None = None,
        control: KVControl | None = None,
    ) -> None:
        self.store = store
        self.text = text or teachers_tokens(store)
        self.reader = KVReader(store) if with_kv else None
        self.with_queries = with_queries
        self.alignment = TokenAlignment(store, self.text, time_map, stretch) if time_map != "identity" else None
        self.segments = segments
        self.control = control

    def coverage(self, indices: Sequence[int]) -> Coverage:
        """How many of the student's tokens have a counterpart whose KV is stored. Only of a dataset `with_kv`."""
        assert self.reader is not None
        if self.alignment is not None:
            found = (self.alignment.coverage(index, self.reader.read_positions([index])) for index in indices)
            return sum(found, Coverage())
        # Equal tokens pair one to one.
        rows = np.asarray(indices)
        kept = int(self.store.kv_length[rows].sum())
        return Coverage(int(self.text.length[rows].sum()), kept, kept)

    def __len__(self) -> int:
        return self.store.num_samples

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.student(indices) | (self.teacher(indices) if self.reader is not None else {})

    def student(self, indices: Sequence[int]) -> Batch:
        """The student's side of a batch."""
        segments = self._segments(indices)
        input_ids = self.text.input_ids[np.asarray(indices), : segments.shape[1]].astype(np.int64)
        learned = (segments != Segment.PADDING) & (segments != Segment.PROMPT)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy((segments != Segment.PADDING).astype(np.int64)),
            "labels": torch.from_numpy(np.where(learned, input_ids, IGNORED)),
        }

    def _segments(self, indices: Sequence[int]) -> NDArray[np.int8]:
        rows = np.asarray(indices)
        return self.text.segment_ids[rows, : int(self.text.length[rows].max())]

    def teacher(self, indices: Sequence[int]) -> Batch:
        """The teacher's side of a batch. Only of a dataset `with_kv`."""
        assert self.reader is not None
        kv, positions = self.reader.read_with_positions(indices)
        batch = {"teacher_kv": kv}
        if self.with_queries:
            batch["teacher_queries"] = self.reader.read_queries(indices)
        if self.alignment is not None:
            time_map = self.alignment.of(indices, positions)
            batch |= {"time_index": time_map.index, "time_weight": time_map.weight}
        elif positions is not None:
            batch["kv_positions"] = positions
        if self.segments is not None:
            batch["kv_mask"] = torch.from_numpy(np.isin(self._segments(indices), self.segments).astype(np.int64))
        if positions is not None:
            batch["teacher_positions"] = positions
        if self.control is None:
            return batch
        return self.control(batch, indices, self.store.kv_length[np.asarray(indices)])
