"""Batches against the arrays of the store, the time-shuffled control, and the teacher's moments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kvpipe.data.sample import Segment
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.kv_controls import ShuffledKV
from kvpipe.pipeline.losses import IGNORED
from kvpipe.pipeline.training_data import KVDataset
from torch import Tensor

LENGTHS = [7, 33, 4, 20, 64, 5, 32, 11, 9, 2]

MakeStore = Callable[..., tuple[KVStore, list[Tensor]]]
Stored = tuple[KVStore, list[Tensor]]


@pytest.fixture
def stored(make_segmented_store: MakeStore) -> Stored:
    return make_segmented_store(LENGTHS)


def sorted_rows(kv: Tensor) -> list[tuple[float, ...]]:
    """The tokens of one sample's KV `[L, 2, H, T, D]` as a sorted list of rows."""
    return sorted(tuple(row) for row in kv.movedim(3, 0).flatten(1).tolist())


@pytest.mark.parametrize("indices", [[0], [2, 0, 3], [4, 1], [9, 9], list(range(10))])
def test_a_batch_is_what_the_store_holds(stored: Stored, indices: list[int]) -> None:
    store, kv = stored
    batch = KVDataset(store, with_kv=True).__getitems__(indices)
    width = max(LENGTHS[i] for i in indices)
    assert {name: tensor.shape[1] for name, tensor in batch.items() if name != "teacher_kv"} == {
        "input_ids": width,
        "attention_mask": width,
        "labels": width,
    }
    assert batch["teacher_kv"].shape == (3, 2, len(indices), 2, width, 4)
    for row, index in enumerate(indices):
        length = LENGTHS[index]
        assert batch["input_ids"][row, :length].tolist() == store.input_ids[index, :length].tolist()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (width - length)
        assert torch.equal(batch["teacher_kv"][:, :, row, :, :length], kv[index])
        assert not batch["teacher_kv"][:, :, row, :, length:].any()


def test_labels_leave_out_the_prompt_and_the_padding(stored: Stored) -> None:
    store, _ = stored
    batch = KVDataset(store, with_kv=False).__getitems__(list(range(10)))
    width = max(LENGTHS)
    segments = torch.from_numpy(store.segment_ids[:, :width])
    learned = (segments == Segment.REASONING) | (segments == Segment.ANSWER)
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
    assert (batch["labels"][~learned] == IGNORED).all()
    # Sample 9 is two tokens of prompt: it is read, and teaches nothing.
    assert (batch["labels"][9] == IGNORED).all()
    assert int(learned.sum()) == sum(max(0, length - 3) for length in LENGTHS)


def test_without_kv_no_shard_is_opened(stored: Stored) -> None:
    dataset = KVDataset(stored[0], with_kv=False)
    assert dataset.reader is None
    assert set(dataset.__getitems__([1, 2])) == {"input_ids", "attention_mask", "labels"}
    assert len(dataset) == len(LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kv_keeps_the_stores_precision(make_segmented_store: MakeStore, dtype: torch.dtype) -> None:
    store, kv = make_segmented_store([5, 40], dtype=dtype)
    found = KVDataset(store, with_kv=True).__getitems__([1])["teacher_kv"]
    assert found.dtype == dtype
    assert torch.equal(found[:, :, 0], kv[1])


def test_shuffling_permutes_the_real_tokens_of_each_sample(stored: Stored) -> None:
    store, kv = stored
    indices = list(range(10))
    plain = KVDataset(store, with_kv=True).__getitems__(indices)
    shuffled = KVDataset(store, with_kv=True, control=ShuffledKV(3)).__getitems__(indices)
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(plain[name], shuffled[name])
    for index in indices:
        length = LENGTHS[index]
        found = shuffled["teacher_kv"][:, :, index]
        assert sorted_rows(found[..., :length, :]) == sorted_rows(kv[index])
        assert not found[..., length:, :].any()
    moved = [not torch.equal(shuffled["teacher_kv"][:, :, i, :, : LENGTHS[i]], kv[i]) for i in indices]
    assert sum(moved) >= 8


def test_one_permutation_serves_all_layers_heads_keys_and_values(stored: Stored) -> None:
    store, kv = stored
    found = KVDataset(store, with_kv=True, control=ShuffledKV(3)).__getitems__([1])["teacher_kv"][:, :, 0]
    first = kv[1][0, 0, 0, :, 0].tolist()
    order = [first.index(value) for value in found[0, 0, 0, :, 0].tolist()]
    assert sorted(order) == list(range(33))
    assert torch.equal(found, kv[1][..., order, :])


def test_a_samples_permutation_depends_on_the_seed_and_nothing_else(stored: Stored) -> None:
    store, _ = stored
    dataset = KVDataset(store, with_kv=True, control=ShuffledKV(3))
    alone = dataset.__getitems__([3])["teacher_kv"][:, :, 0]
    again = dataset.__getitems__([4, 3, 1])["teacher_kv"][:, :, 1, :, : LENGTHS[3]]
    fresh = KVDataset(store, with_kv=True, control=ShuffledKV(3)).__getitems__([3])["teacher_kv"][:, :, 0]
    other = KVDataset(store, with_kv=True, control=ShuffledKV(4)).__getitems__([3])["teacher_kv"][:, :, 0]
    assert torch.equal(alone, again)
    assert torch.equal(alone, fresh)
    assert not torch.equal(alone, other)


def test_a_shuffled_batch_says_where_its_tokens_really_were(stored: Stored) -> None:
    store, kv = stored
    batch = KVDataset(store, with_kv=True, control=ShuffledKV(3)).__getitems__([1, 3])
    for row, index in enumerate([1, 3]):
        length = LENGTHS[index]
        order = batch["teacher_positions"][row, :length]
        assert sorted(order.tolist()) == list(range(length))
        assert torch.equal(batch["teacher_kv"][:, :, row, :, :length], kv[index][..., order, :])


def test_the_kv_of_some_segments_is_compared_alone(stored: Stored) -> None:
    store, _ = stored
    batch = KVDataset(store, with_kv=True, segments=[Segment.PROMPT, Segment.ANSWER]).__getitems__([3, 0])
    segments = store.segment_ids[[3, 0], : LENGTHS[3]]
    assert (
        batch["kv_mask"].tolist() == ((segments == Segment.PROMPT) | (segments == Segment.ANSWER)).astype(int).tolist()
    )
