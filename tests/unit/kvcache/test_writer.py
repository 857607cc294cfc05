"""Batches in any order become whole shards; what fails, fails loudly, and leaves no thread and no half shard."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.errors import ModelError, StoreError
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.writer import ShardWriter
from torch import Tensor

MakeStore = Callable[..., tuple[KVStore, Tensor]]
LENGTHS = [5, 40, 33, 2, 64, 32, 1]


def pairs(kv: Tensor, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    return [(layer[0, list(indices)], layer[1, list(indices)]) for layer in kv]


def writer_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "kvpipe-writer"]


def files(store: KVStore) -> set[str]:
    folders = (store.path / "kv" / "c", store.path / "ledger" / "c")
    return {str(f.relative_to(store.path)) for folder in folders for f in folder.rglob("*") if f.is_file()}


KV, LEDGER = "kv/c/0/0", "ledger/c"
"""The first is written by the caller, where KV lies on the CPU; the second by the thread."""


def in_the_way(store: KVStore, shard: int, folder: str = KV) -> Path:
    """Make a shard impossible to write: a file lies where its folder belongs."""
    obstacle = store.path / folder / str(shard)
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_bytes(b"")
    return obstacle


@given(
    order=st.permutations(range(len(LENGTHS))), cuts=st.sets(st.integers(1, len(LENGTHS) - 1)), shard=st.integers(1, 4)
)
def test_batches_may_come_in_any_order(make_store: MakeStore, order: list[int], cuts: set[int], shard: int) -> None:
    store, kv = make_store(LENGTHS, samples_per_shard=shard, num_layers=1, num_kv_heads=1, head_dim=2, fill=False)
    edges = [0, *sorted(cuts), len(order)]
    with ShardWriter(store, range(store.num_shards), queue_size=1) as writer:
        for start, stop in pairwise(edges):
            batch = order[start:stop]
            longest = max(LENGTHS[i] for i in batch)
            writer.put(batch, pairs(kv[..., :longest, :], batch))
    assert store.complete
    assert torch.equal(KVReader(store).read(range(len(LENGTHS)), 64), kv)


def test_padding_is_not_written(make_store: MakeStore) -> None:
    store, kv = make_store([5, 40], fill=False)
    garbage = kv.clone()
    for sample, length in enumerate([5, 40]):
        garbage[:, :, sample, :, length:] = float("nan")
    with ShardWriter(store, [0]) as writer:
        writer.put([0, 1], pairs(garbage, [0, 1]))
    assert torch.equal(KVReader(store).read([0, 1], 64), kv)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_left_out_and_known(make_store: MakeStore, bad: float) -> None:
    store, kv = make_store([5, 40, 33, 2], fill=False)
    broken = kv.clone()
    broken[1, 0, 1, 1, 39, 3] = bad
    with ShardWriter(store, range(2)) as writer:
        writer.put(range(4), pairs(broken, range(4)))
    assert store.complete
    assert store.excluded.tolist() == [1]
    assert [store.indices(split).tolist() for split in ("train", "test")] == [[0, 2], [3]]
    reader = KVReader(store)
    assert torch.equal(reader.read([0, 2, 3], 64), kv[:, :, [0, 2, 3]])
    with pytest.raises(StoreError, match="at sample 1"):
        reader.read([1])
    array = zarr.open_array(store.path / "kv", mode="r")
    assert not np.asarray(array[:, :, 1]).any()


def test_ledger_entries_of_two_shards_in_each_others_place_leave_no_other_sample_out(make_store: MakeStore) -> None:
    """Both are whole, and of shards of as many chunks."""
    store, kv = make_store([40, 33, 50], samples_per_shard=1, fill=False)
    kv[0, 0, 1, 0, 0, 0] = float("nan")
    with ShardWriter(store, range(3)) as writer:
        writer.put(range(3), pairs(kv, range(3)))
    first, second = store.ledger.path(1), store.ledger.path(2)
    entry = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(entry)
    swapped = KVStore.open(store.path)
    assert swapped.finished_shards() == {0}
    assert swapped.excluded.tolist() == []
    with pytest.raises(StoreError, match=r"shard 2 of .* is not in the ledger, or its entry is damaged"):
        swapped.ledger.checksums(2)


def test_a_sample_that_is_not_finite_stops_where_asked(make_store: MakeStore) -> None:
    store, kv = make_store([5, 40], fill=False)
    kv[1, 0, 1, 1, 39, 3] = float("nan")
    with (
        pytest.raises(ModelError, match=r"sample 1 is not finite.*--on-nonfinite exclude"),
        ShardWriter(store, [0], on_nonfinite="stop") as writer,
    ):
        writer.put([0, 1], pairs(kv, [0, 1]))
    assert files(store) == set()


def test_what_was_written_is_counted(make_store: MakeStore) -> None:
    store, kv = make_store(LENGTHS, fill=False)
    with ShardWriter(store, range(store.num_shards)) as writer:
        writer.put(range(len(LENGTHS)), pairs(kv, range(len(LENGTHS))))
    assert store.finished_shards() == set(range(4))
    assert writer.bytes_written == sum(store.shard_path(shard).stat().st_size for shard in range(4))
    assert writer.wait_seconds >= 0


def test_shards_that_are_there_stay_as_they_are(make_store: MakeStore) -> None:
    store, kv = make_store([5, 40, 33, 2])
    (store.path / "ledger" / "c" / "1" / "0").unlink()
    kept = store.shard_path(0)
    before = kept.read_bytes(), kept.stat().st_mtime_ns
    with ShardWriter(store, [1]) as writer:
        writer.put([0, 1, 2, 3], pairs(kv + 1, [0, 1, 2, 3]))
    assert (kept.read_bytes(), kept.stat().st_mtime_ns) == before
    read = KVReader(store).read([0, 1, 2, 3], 64)
    assert torch.equal(read[:, :, :2], kv[:, :, :2])
    assert torch.equal(read[:, :, 2, :, :33], (kv + 1)[:, :, 2, :, :33])


def test_unfinished_shards_are_dropped(make_store: MakeStore) -> None:
    store, kv = make_store([5, 40, 33, 2], fill=False)
    with ShardWriter(store, range(2)) as writer:
        writer.put([0, 3, 1], pairs(kv, [0, 3, 1]))
    assert store.finished_shards() == {0}
    assert files(store) == {"kv/c/0/0/0/0/0/0", "ledger/c/0/0"}


def test_a_repeated_sample_does_not_finish_a_shard(make_store: MakeStore) -> None:
    store, kv = make_store([5, 40], fill=False)
    with ShardWriter(store, [0]) as writer:
        writer.put([0, 0], pairs(kv, [0, 0]))
    assert store.finished_shards() == set()


@pytest.mark.parametrize("folder", [KV, LEDGER])
def test_a_failure_while_writing_is_raised_as_it_is(make_store: MakeStore, folder: str) -> None:
    store, kv = make_store(LENGTHS, samples_per_shard=1, fill=False)
    in_the_way(store, 2, folder)
    with pytest.raises(OSError, match=f"{folder}/2") as failure, ShardWriter(store, range(7)) as writer:
        writer.put([0, 1, 2], pairs(kv, [0, 1, 2]))
    assert isinstance(failure.value, NotADirectoryError | FileExistsError)
    assert writer_threads() == []
    assert store.finished_shards() == {0, 1}


def test_a_failure_stops_the_next_put_and_never_blocks(make_store: MakeStore) -> None:
    store, kv = make_store(LENGTHS, samples_per_shard=1, fill=False)
    in_the_way(store, 0, LEDGER)
    done: list[int] = []

    def compute() -> None:
        with ShardWriter(store, range(7), queue_size=1) as writer:
            for number in range(10_000):
                writer.put([0], pairs(kv, [0]))
                done.append(number)

    with pytest.raises(OSError, match=f"{LEDGER}/0"):
        compute()
    assert len(done) < 10_000
    assert writer_threads() == []
    assert store.finished_shards() == set()


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda kv: kv.float(), id="dtype"),
        pytest.param(lambda kv: kv[1:], id="layers"),
        pytest.param(lambda kv: kv[:, :, :, :1], id="heads"),
        pytest.param(lambda kv: kv[:, :, :, :, :39], id="tokens"),
        pytest.param(lambda kv: kv[..., :2], id="channels"),
    ],
)
def test_kv_that_does_not_fit_the_store_is_refused(make_store: MakeStore, wrong: Callable[[Tensor], Tensor]) -> None:
    store, kv = make_store([5, 40], fill=False)
    with pytest.raises(ValueError, match="does not fit the store"), ShardWriter(store, [0]) as writer:
        writer.put([0, 1], pairs(wrong(kv), [0, 1]))
    assert files(store) == set()


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda queries: None, id="none"),
        pytest.param(lambda queries: [query.float() for query in queries], id="dtype"),
        pytest.param(lambda queries: queries[1:], id="layers"),
        pytest.param(lambda queries: [query[:, :2] for query in queries], id="heads"),
        pytest.param(lambda queries: [query[:, :, :39] for query in queries], id="tokens"),
        pytest.param(lambda queries: [queries[0], queries[1][:, :2]], id="heads of one layer"),
    ],
)
def test_queries_that_do_not_fit_the_store_are_refused(make_store: MakeStore, wrong: Callable[[Any], Any]) -> None:
    store, kv = make_store([5, 40], query_heads=4, fill=False)
    queries = list(torch.zeros(2, 2, 4, 64, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="does not fit the store"), ShardWriter(store, [0]) as writer:
        writer.put([0, 1], pairs(kv, [0, 1]), queries=wrong(queries))
    assert files(store) == set()


def test_queries_where_the_store_keeps_none_are_refused(make_store: MakeStore) -> None:
    store, kv = make_store([5, 40], fill=False)
    queries = list(torch.zeros(2, 2, 4, 64, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="does not fit the store"), ShardWriter(store, [0]) as writer:
        writer.put([0, 1], pairs(kv, [0, 1]), queries=queries)


def test_a_sample_with_a_query_that_is_no_number_is_left_out(make_store: MakeStore) -> None:
    store, kv = make_store([5, 40], query_heads=4, fill=False)
    queries = torch.ones(2, 2, 4, 64, 4, dtype=torch.bfloat16)
    queries[1, 0, 3, 4, 0] = float("inf")
    queries[1, 1, 3, 40, 0] = float("nan")
    with ShardWriter(store, [0]) as writer:
        writer.put([0, 1], pairs(kv, [0, 1]), queries=list(queries))
    assert store.excluded.tolist() == [0]
    assert torch.equal(KVReader(store).read_queries([1]), queries[:, [1], :, :40])


def test_the_error_of_the_body_goes_first(make_store: MakeStore) -> None:
    store, kv = make_store([5, 40], samples_per_shard=1, fill=False)
    in_the_way(store, 0, LEDGER)

    def compute() -> None:
        with ShardWriter(store, range(2)) as writer:
            writer.put([0, 1], pairs(kv, [0, 1]))
            raise RuntimeError("the teacher failed")

    with pytest.raises(RuntimeError, match="the teacher failed"):
        compute()
    assert writer_threads() == []


@pytest.mark.parametrize("folder", [KV, LEDGER])
def test_a_failed_shard_can_be_written_later(make_store: MakeStore, folder: str) -> None:
    store, kv = make_store([5, 40], samples_per_shard=1, fill=False)
    obstacle = in_the_way(store, 1, folder)
    with pytest.raises(OSError, match=f"{folder}/1"), ShardWriter(store, range(2)) as writer:
        writer.put([0, 1], pairs(kv, [0, 1]))
    obstacle.unlink()
    missing = set(range(2)) - store.finished_shards()
    with ShardWriter(store, missing) as writer:
        writer.put([0, 1], pairs(kv, [0, 1]))
    assert missing == {1}
    assert torch.equal(KVReader(store).read([0, 1], 64), kv)
