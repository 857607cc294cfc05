"""Controls of noise: the teacher's moments, nothing of its content. (Shuffled KV: test_training_data.py.)"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.kv_controls import RandomKV
from kvpipe.pipeline.kv_moments import stored_moments
from kvpipe.pipeline.training_data import KVDataset
from torch import Tensor

LENGTHS = [7, 33, 4, 20, 64, 5, 32, 11, 9, 2]
ALL = list(range(len(LENGTHS)))

Stored = tuple[KVStore, list[Tensor]]


@pytest.fixture
def stored(make_segmented_store: Callable[..., Stored]) -> Stored:
    return make_segmented_store(LENGTHS)


def noisy(store: KVStore, seed: int = 3) -> KVDataset:
    dataset = KVDataset(store, with_kv=True)
    dataset.control = RandomKV(seed, stored_moments(dataset, ALL))
    return dataset


def test_stored_moments_are_those_of_all_tokens_at_once(stored: Stored) -> None:
    store, kv = stored
    mean, std = stored_moments(KVDataset(store, with_kv=True), ALL)["teacher_kv"]
    tokens = np.concatenate([sample.double().numpy() for sample in kv], axis=3)
    np.testing.assert_allclose(mean[:, :, 0, :, 0], tokens.mean(3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std[:, :, 0, :, 0], tokens.std(3), rtol=1e-5, atol=1e-6)


def test_noise_has_the_teachers_moments_and_is_unlike_it(stored: Stored) -> None:
    store, kv = stored
    dataset = noisy(store)
    batch = dataset.__getitems__(ALL)
    found = torch.cat([batch["teacher_kv"][:, :, row, :, :length] for row, length in enumerate(LENGTHS)], dim=3)
    real = torch.cat(kv, dim=3)
    mean, std = (moment[:, :, 0] for moment in dataset.control.moments["teacher_kv"])  # type: ignore[union-attr]
    drawn = ((found - mean) / std).flatten()
    # Standard errors of mean and deviation over all draws, four of them.
    assert abs(float(drawn.mean())) < 4 / len(drawn) ** 0.5
    assert abs(float(drawn.std()) - 1) < 4 / (2 * len(drawn)) ** 0.5
    content = ((real - mean) / std).flatten()
    assert abs(float((drawn * content).mean())) < 4 / len(drawn) ** 0.5


def test_padding_and_the_students_side_stay_as_they_are(stored: Stored) -> None:
    store, _ = stored
    plain, batch = KVDataset(store, with_kv=True).__getitems__(ALL), noisy(store).__getitems__(ALL)
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(plain[name], batch[name])
    assert batch["teacher_kv"].dtype == plain["teacher_kv"].dtype
    for row, length in enumerate(LENGTHS):
        assert not batch["teacher_kv"][:, :, row, :, length:].any()


def test_a_samples_noise_depends_on_the_seed_and_nothing_else(stored: Stored) -> None:
    store, _ = stored
    alone = noisy(store).__getitems__([3])["teacher_kv"][:, :, 0]
    again = noisy(store).__getitems__([4, 3, 1])["teacher_kv"][:, :, 1, :, : LENGTHS[3]]
    other = noisy(store, seed=4).__getitems__([3])["teacher_kv"][:, :, 0]
    assert torch.equal(alone, again)
    assert not torch.equal(alone, other)
    assert len({tuple(noisy(store).__getitems__([i])["teacher_kv"].flatten()[:3].tolist()) for i in ALL}) == len(ALL)
