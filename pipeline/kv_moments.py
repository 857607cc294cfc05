"""The moments of KV: of either side as it is compared, for targets; of the store's as it is, for noise like it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .channel_moments import ChannelMoments, Moments
from .distiller import KVDistiller
from .kv_controls import TEACHER_TENSORS
from .paired_kv import FIT_SAMPLES, batches, paired_kv
from .training_data import KVDataset


def teacher_moments(distiller: KVDistiller, dataset: KVDataset, indices: Sequence[int]) -> Moments:
    """Mean and standard deviation of every channel over the compared tokens of the first samples of `indices`."""
    moments = ChannelMoments()
    for _, batch in batches(dataset, indices[:FIT_SAMPLES]):
        moments.update(*distiller.teacher.teacher_side(batch))
    return moments.value()


def student_moments(distiller: KVDistiller, dataset: KVDataset, indices: Sequence[int]) -> Moments:
    """The same of the student's own KV, as it is now."""
    moments = ChannelMoments()
    for pair in paired_kv(distiller, dataset, indices[:FIT_SAMPLES]):
        moments.update(pair.student, pair.mask)
    return moments.value()


def stored_moments(dataset: KVDataset, indices: Sequence[int]) -> dict[str, Moments]:
    """The same of `teacher_kv` and `teacher_queries` as the store keeps them, over all tokens that it keeps."""
    moments: dict[str, ChannelMoments] = {}
    for rows, batch in batches(dataset, indices[:FIT_SAMPLES]):
        for name in (name for name in TEACHER_TENSORS if name in batch):
            kept = torch.arange(batch[name].shape[-2]) < torch.from_numpy(dataset.store.kv_length[rows])[:, None]
            moments.setdefault(name, ChannelMoments()).update(batch[name], kept.int())
    return {name: moment.value() for name, moment in moments.items()}
