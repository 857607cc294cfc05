"""The moments of a teacher's KV, as a student sees it, against those of all its tokens at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kvpipe.data.sample import Segment
from kvpipe.kvcache.align.layer_map import LayerMap, layer_map
from kvpipe.kvcache.align.teacher_view import TeacherView
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline import kv_moments as module
from kvpipe.pipeline import paired_kv as paired
from kvpipe.pipeline.aligned_teacher import AlignedTeacher
from kvpipe.pipeline.distiller import KVDistiller
from kvpipe.pipeline.kv_moments import teacher_moments
from kvpipe.pipeline.paired_kv import paired_kv
from kvpipe.pipeline.training_data import KVDataset
from torch import Tensor
from transformers import PreTrainedModel

LENGTHS = [7, 33, 4, 20, 64, 5, 32, 11, 9, 2]

MakeStore = Callable[..., tuple[KVStore, list[Tensor]]]
Stored = tuple[KVStore, list[Tensor]]


@pytest.fixture
def stored(make_segmented_store: MakeStore) -> Stored:
    return make_segmented_store(LENGTHS)


@pytest.fixture
def distiller(make_model: Callable[..., PreTrainedModel]) -> KVDistiller:
    return KVDistiller(make_model(), [AlignedTeacher(TeacherView(LayerMap.identity(3)))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_moments_are_those_of_the_unpadded_tokens(
    make_segmented_store: MakeStore,
    distiller: KVDistiller,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    batch_size: int,
) -> None:
    monkeypatch.setattr(paired, "BATCH", batch_size)
    store, kv = make_segmented_store(LENGTHS, dtype=dtype)
    mean, std = teacher_moments(distiller, KVDataset(store, with_kv=True), range(10))
    tokens = np.concatenate([sample.double().numpy() for sample in kv], axis=3)
    assert mean.shape == std.shape == (3, 2, 1, 2, 1, 4)
    np.testing.assert_allclose(mean[:, :, 0, :, 0], tokens.mean(3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std[:, :, 0, :, 0], tokens.std(3), rtol=1e-5, atol=1e-6)


def test_whoever_looks_at_one_batch_alone_leaves_the_student_as_it_was(stored: Stored, distiller: KVDistiller) -> None:
    distiller.train()
    assert any(int(pair.mask.sum()) for pair in paired_kv(distiller, KVDataset(stored[0], with_kv=True), range(10)))
    assert distiller.student.training


def test_moments_read_the_first_samples_only(
    stored: Stored, distiller: KVDistiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIT_SAMPLES", 2)
    store, kv = stored
    mean, _ = teacher_moments(distiller, KVDataset(store, with_kv=True), [4, 6, 0, 1])
    tokens = torch.cat([kv[4], kv[6]], dim=3).double()
    torch.testing.assert_close(mean[:, :, 0, :, 0].double(), tokens.mean(3), rtol=1e-5, atol=1e-6)


def test_moments_are_those_of_mapped_layers(stored: Stored, make_model: Callable[..., PreTrainedModel]) -> None:
    store, kv = stored
    uniform = layer_map("uniform", 2, 3)
    view = TeacherView(uniform)
    mean, std = teacher_moments(
        KVDistiller(make_model(), [AlignedTeacher(view)]), KVDataset(store, with_kv=True), range(10)
    )
    mixed = uniform.apply(torch.cat(kv, dim=3).double())
    torch.testing.assert_close(mean[:, :, 0, :, 0].double(), mixed.mean(3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std[:, :, 0, :, 0].double(), mixed.std(3, correction=0), rtol=1e-5, atol=1e-5)


def test_moments_are_those_of_the_compared_segments(stored: Stored, distiller: KVDistiller) -> None:
    store, kv = stored
    mean, _ = teacher_moments(distiller, KVDataset(store, with_kv=True, segments=[Segment.ANSWER]), range(10))
    answers = [sample[..., store.segment_ids[i, : LENGTHS[i]] == Segment.ANSWER, :] for i, sample in enumerate(kv)]
    torch.testing.assert_close(mean[:, :, 0, :, 0], torch.cat(answers, dim=3).mean(3), rtol=1e-5, atol=1e-5)
