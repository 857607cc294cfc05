"""Which samples of several stores belong together, and what a batch of them holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from kvpipe.kvcache.align.time_warp import TimeMap
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.fused_dataset import FusedDataset
from kvpipe.pipeline.kv_controls import ShuffledKV
from kvpipe.pipeline.matched_stores import MatchedStore, common_samples, match_stores
from kvpipe.pipeline.student_text import resolve_time_map, teachers_tokens
from kvpipe.pipeline.teacher_batches import of_teacher
from kvpipe.pipeline.training_data import KVDataset
from torch import Tensor

LENGTHS = [5, 40, 33, 7, 12, 3]

MakeStore = Callable[..., tuple[KVStore, Tensor]]


def record(number: int, reasoning: str = "r", prompt: str | None = None) -> dict[str, Any]:
    return {"id": f"s{number}", "prompt": prompt or f"p{number}", "reasoning": reasoning, "answer": "a"}


def records(numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [record(number) for number in numbers]


@pytest.fixture
def make_numbered(make_store: MakeStore) -> Callable[..., tuple[KVStore, Tensor]]:
    """A store of the samples with these numbers, in this order."""

    def make(numbers: Sequence[int], **options: Any) -> tuple[KVStore, Tensor]:
        lengths = [LENGTHS[number] for number in numbers]
        return make_store(lengths, records=options.pop("records", records(numbers)), dtype=torch.float32, **options)

    return make


def matched(*stores: KVStore) -> list[MatchedStore]:
    return match_stores(stores, teachers_tokens(stores[0]))


def test_samples_belong_together_by_their_id(make_numbered: MakeStore) -> None:
    (first, _), (second, _) = make_numbered(range(6)), make_numbered([4, 2, 0])
    own, other = matched(first, second)
    assert own.rows.tolist() == list(range(6))
    assert other.rows.tolist() == [2, -1, 1, -1, 0, -1]
    assert other.of([0, 1, 4]) == [2, 0]
    assert common_samples([own, other], [0, 1, 4]) == 2


def test_samples_without_finite_kv_count_as_missing(make_numbered: MakeStore) -> None:
    (first, _), (second, _) = make_numbered(range(6)), make_numbered(range(6))
    vars(second)["excluded"] = np.array([3])
    assert matched(first, second)[1].rows.tolist() == [0, 1, 2, -1, 4, 5]


def test_equal_ids_pair_in_their_order(make_numbered: MakeStore) -> None:
    (first, _), (second, _) = make_numbered([1, 1, 2]), make_numbered([2, 1])
    assert matched(first, second)[1].rows.tolist() == [1, -1, 0]


def test_the_text_is_the_first_stores_in_the_order_of_the_other(make_numbered: MakeStore) -> None:
    (first, _), (second, _) = make_numbered(range(6)), make_numbered([4, 2, 0])
    text = matched(first, second)[1].text
    for row, number in enumerate([4, 2, 0]):
        length = LENGTHS[number]
        assert text.length[row] == length
        np.testing.assert_array_equal(text.input_ids[row, :length], first.input_ids[number, :length])
        np.testing.assert_array_equal(text.segment_ids[row], first.segment_ids[number])


def test_equal_tokens_need_no_time_map_and_evicted_ones_do(make_numbered: MakeStore) -> None:
    (first, _), (twin, _) = make_numbered(range(6)), make_numbered(range(6))
    (evicted, _) = make_numbered(range(6), kept=[n // 2 for n in LENGTHS])
    assert [resolve_time_map("auto", each.text) for each in matched(first, twin)] == ["identity", "identity"]
    assert [resolve_time_map("auto", each.text) for each in matched(first, evicted)] == ["identity", "span-last"]
    assert resolve_time_map("auto", matched(evicted, first)[0].text) == "span-last"


def test_another_text_after_the_same_prompt_is_stretched_over_its_segments(make_numbered: MakeStore) -> None:
    (first, _) = make_numbered(range(6))
    (second, _) = make_numbered(range(6), records=[record(n, "longer" if n == 3 else "r") for n in range(6)])
    text = matched(first, second)[1].text
    assert text.other_text is not None
    assert text.other_text.tolist() == [number == 3 for number in range(6)]


@pytest.mark.parametrize(
    ("second", "found"),
    [
        ([record(0), record(1, prompt="another"), record(2)], "1 of 3 common ids with another prompt, the first s1"),
        ([record(7), record(8), record(9)], "no common id"),
    ],
)
def test_stores_over_other_prompts_are_refused(
    make_numbered: MakeStore, second: list[dict[str, Any]], found: str
) -> None:
    (first, _), (other, _) = make_numbered(range(6)), make_numbered(range(3), records=second)
    with pytest.raises(StoreError, match=f"not over the same prompts.*found {found}"):
        matched(first, other)


def test_one_store_twice_is_refused(make_numbered: MakeStore) -> None:
    (first, _) = make_numbered(range(6))
    with pytest.raises(StoreError, match="one store is named twice"):
        matched(first, KVStore.open(first.path))


# ---------------------------------------------------------------------- batches


def fused(stores: Sequence[MatchedStore]) -> FusedDataset:
    datasets = [
        KVDataset(each.store, each.text, with_kv=True, time_map=resolve_time_map("auto", each.text)) for each in stores
    ]
    return FusedDataset(datasets, stores)


@pytest.mark.parametrize("indices", [[0, 1, 2], [4, 1], [1, 3, 5], [2], [5, 4, 3, 2, 1, 0]])
def test_a_batch_holds_every_teachers_kv_of_the_samples_it_has(make_numbered: MakeStore, indices: list[int]) -> None:
    (first, _), (second, other_kv) = make_numbered(range(6)), make_numbered(range(3), num_layers=3, head_dim=6)
    stores = matched(first, second)
    batch = fused(stores).__getitems__(indices)
    plain = KVDataset(first, with_kv=True).__getitems__(indices)
    own = of_teacher(batch, 0)
    assert own.keys() == plain.keys()
    assert all(torch.equal(own[name], plain[name]) for name in plain)
    other = of_teacher(batch, 1)
    width = max(LENGTHS[index] for index in indices)
    assert other["teacher_kv"].shape == (3, 2, len(indices), 2, width, 6)
    for place, index in enumerate(indices):
        row, length = stores[1].rows[index], LENGTHS[index]
        mask = other.get("kv_mask", other["attention_mask"])[place]
        assert mask.tolist() == ([1] * length + [0] * (width - length) if row >= 0 else [0] * width)
        if row >= 0:
            assert torch.equal(other["teacher_kv"][:, :, place, :, :length], other_kv[:, :, row, :, :length])


def test_of_a_store_that_evicts_a_batch_maps_the_kept_tokens(make_numbered: MakeStore) -> None:
    (first, _) = make_numbered(range(6))
    (evicted, kv) = make_numbered([0, 1, 4], kept=[2, 20, 6])
    batch = fused(matched(first, evicted)).__getitems__([1, 2, 0])
    own = of_teacher(batch, 1)
    time_map = TimeMap(own["time_index"], own["time_weight"])
    assert time_map.mask.shape == own["attention_mask"].shape
    assert time_map.mask.sum(dim=1).tolist() == [20, 0, 2]
    warped = time_map.warp(own["teacher_kv"])
    assert torch.equal(warped[:, :, 0, :, 1:40:2], kv[:, :, 1, :, 1:40:2])
    assert own["kv_mask"][1].sum() == 0


def test_shuffled_positions_are_as_wide_as_the_kv(make_numbered: MakeStore) -> None:
    """Where the batch's longest sample is missing, and keys are compared without their rotation."""
    (first, _), (second, _) = make_numbered(range(6)), make_numbered([0])
    stores = matched(first, second)
    datasets = [KVDataset(each.store, each.text, with_kv=True, control=ShuffledKV(0)) for each in stores]
    own = of_teacher(FusedDataset(datasets, stores).__getitems__([1, 0]), 1)
    assert own["teacher_positions"].shape[1] == own["teacher_kv"].shape[4] == LENGTHS[1]
