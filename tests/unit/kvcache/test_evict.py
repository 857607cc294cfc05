"""Which tokens stay: policies against slow references, and the same for a sample in whatever batch it comes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.errors import ConfigError
from kvpipe.kvcache.evict import (
    POLICIES,
    RKV,
    Observed,
    choose_tokens,
    kept_lengths,
    require_reachable,
)
from kvpipe.kvcache.layout import take_tokens
from torch import Tensor

LENGTHS = [40, 3, 25, 9]


def observed(lengths: list[int], *, seed: int = 0, padding: float = 0.0) -> Observed:
    """A batch whose samples depend on their lengths alone, padded with some number."""
    width, layers = max(lengths), 2
    samples = list(lengths)
    kv = torch.full((layers, 2, len(lengths), 2, width, 8), padding)
    window = torch.tensor(lengths)[:, None] - RKV.window + torch.arange(RKV.window)
    queries = torch.full((layers, len(lengths), 4, RKV.window, 8), padding)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        # Some tokens much like others.
        base = torch.randn(layers, 2, 2, 4, 8, generator=generator)
        kv[:, :, row, :, :length] = base[:, :, :, torch.arange(length) % 4] + 0.4 * torch.randn(
            layers, 2, 2, length, 8, generator=generator
        )
        own = torch.randn(layers, 4, RKV.window, 8, generator=generator)
        there = window[row] >= 0
        queries[:, row, :, there] = own[:, :, there]
    pairs = [(key, value) for key, value in kv]
    return Observed(samples, torch.tensor(lengths), pairs, seed, list(queries), window)


def rkv_reference(batch: Observed, row: int) -> list[float]:
    """R-KV of one sample, token by token, in float64."""
    assert batch.queries is not None
    assert batch.window is not None
    length, total = int(batch.lengths[row]), np.zeros(int(batch.lengths[row]))
    for (keys, _), queries in zip(batch.pairs, batch.queries, strict=True):
        for head in range(2):
            key = keys[row, head, :length].double().numpy()
            attention, count = np.zeros(length), 0
            for place, position in enumerate(batch.window[row].tolist()):
                if position < 0:
                    continue
                count += 1
                for query in queries[row, 2 * head : 2 * head + 2, place].double().numpy():
                    weights = np.array([math.exp(query @ key[t]) if t <= position else 0.0 for t in range(length)])
                    attention += weights / weights.sum() / 2
            attention /= count
            importance = np.array([attention[max(0, t - 3) : t + 4].max() for t in range(length)])
            unit = key / np.linalg.norm(key, axis=1, keepdims=True)
            similarity = unit @ unit.T
            for t in range(length):
                similarity[t, t] = 0
                if alike := [other for other in range(length) if similarity[t, other] > 0.5 and other != t]:
                    similarity[t, alike[-1]] = 0
            mean = similarity.sum(0) / length
            redundancy = np.exp(mean) / np.exp(mean).sum()
            total += (0.1 * importance - 0.9 * redundancy) / 2
    recent = max(0, length - RKV.window)
    total[recent:] = 2**20 + np.arange(recent, length)
    return list(total)


def test_rkv_is_what_a_loop_over_tokens_finds() -> None:
    batch = observed(LENGTHS)
    scores = POLICIES["rkv"].scores(batch)
    for row, length in enumerate(LENGTHS):
        assert scores[row, :length].tolist() == pytest.approx(rkv_reference(batch, row), abs=1e-5)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_sample_keeps_the_same_tokens_in_whatever_batch(policy: str) -> None:
    def kept(batch: Observed, row: int) -> list[int]:
        eligible = torch.arange(batch.num_tokens) < batch.lengths[:, None]
        chosen = choose_tokens(POLICIES[policy].scores(batch), eligible, (batch.lengths + 1) // 2)
        return [place for place in chosen[row].tolist() if place >= 0]

    together = observed(LENGTHS, padding=3.0)
    for row, length in enumerate(LENGTHS):
        assert kept(together, row) == kept(observed([length]), 0)
        assert len(kept(together, row)) == (length + 1) // 2


def test_random_tokens_depend_on_the_seed() -> None:
    chosen = [
        choose_tokens(
            POLICIES["random"].scores(observed([40], seed=seed)), torch.ones(1, 40).bool(), torch.tensor([10])
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


def test_right_crop_keeps_the_first() -> None:
    chosen = choose_tokens(
        POLICIES["right-crop"].scores(observed([9, 4])),
        torch.arange(9) < torch.tensor([[9], [4]]),
        torch.tensor([5, 2]),
    )
    assert chosen.tolist() == [[0, 1, 2, 3, 4], [0, 1, -1, -1, -1]]


def test_rkv_prefers_what_is_attended_and_drops_what_is_said_twice() -> None:
    """Of 20 tokens six share one key: all but the last of them go."""
    key = torch.nn.functional.normalize(torch.randn(1, 1, 20, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    key[:, :, 2:12:2] = key[:, :, :1]
    window = torch.arange(12, 20)[None]
    batch = Observed([0], torch.tensor([20]), [(key, key)], 0, [torch.zeros(1, 1, 8, 64)], window)
    kept = choose_tokens(POLICIES["rkv"].scores(batch), torch.ones(1, 20).bool(), torch.tensor([15]))[0].tolist()
    assert set(range(20)) - {0, 2, 4, 6, 8} == set(kept)


@given(st.data())
def test_the_best_eligible_tokens_are_chosen_in_reading_order(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    scores = torch.tensor(data.draw(st.lists(st.integers(-5, 5), min_size=rows * width, max_size=rows * width)))
    scores = scores.float().view(rows, width)
    bits = data.draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    eligible = torch.tensor(bits).view(rows, width)
    counts = torch.tensor([data.draw(st.integers(0, int(eligible[row].sum()))) for row in range(rows)])
    chosen = choose_tokens(scores, eligible, counts)
    for row in range(rows):
        best = sorted((t for t in range(width) if eligible[row, t]), key=lambda t: (-float(scores[row, t]), t))
        expected = sorted(best[: int(counts[row])])
        assert chosen[row].tolist() == expected + [-1] * (chosen.shape[1] - len(expected))


def test_rkv_keeps_the_last_of_all_within_a_budget_smaller_than_its_window() -> None:
    scores = POLICIES["rkv"].scores(observed([40]))
    assert choose_tokens(scores, torch.ones(1, 40).bool(), torch.tensor([4])).tolist() == [[36, 37, 38, 39]]


def test_a_share_is_rounded_up_and_no_further() -> None:
    eligible = np.arange(1, 1025, dtype=np.int32)
    for percent in range(1, 100):
        assert kept_lengths(eligible, percent / 100).tolist() == [-(-n * percent // 100) for n in range(1, 1025)]


def test_budgets_are_shares_or_numbers() -> None:
    eligible = np.array([10, 3, 0, 1], np.int32)
    assert kept_lengths(eligible, None).tolist() == [10, 3, 0, 1]
    assert kept_lengths(eligible, 0.5).tolist() == [5, 2, 0, 1]
    assert kept_lengths(eligible, 4.0).tolist() == [4, 3, 0, 1]
    assert kept_lengths(eligible, 4.0).dtype == np.int32


def test_a_budget_that_no_sample_reaches_is_refused() -> None:
    require_reachable(12.0, 12)
    require_reachable(0.9, 1)
    require_reachable(None, 1)
    with pytest.raises(ConfigError, match="larger than every sample: expected at most 12 tokens, found 13"):
        require_reachable(13.0, 12)
    with pytest.raises(ConfigError, match="no token is left to keep"):
        require_reachable(None, 0)


def test_tokens_are_taken_from_any_shape() -> None:
    kv = torch.randn(3, 2, 4, 2, 9, 5)
    places = torch.tensor([[0, 8], [3, 4], [7, -1], [2, 2]])
    taken = take_tokens(kv, places)
    assert taken.shape == (3, 2, 4, 2, 2, 5)
    for row in range(4):
        for k, place in enumerate(places[row].clamp_min(0).tolist()):
            assert torch.equal(taken[:, :, row, :, k], kv[:, :, row, :, place])


MakeStore = Callable[..., tuple[Any, Tensor]]


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_a_store_gives_back_the_kept_tokens_and_where_they_were(make_store: MakeStore, codec: str) -> None:
    from kvpipe.kvcache.reader import KVReader
    from kvpipe.kvcache.verify import verify_shards

    kept = [33, 2, 10, 0, 1]
    store, kv = make_store([70, 5, 40, 33, 6], kept=kept, codec=codec)
    assert store.evicts
    assert store.lossy
    assert store.excluded.tolist() == [3], "nothing is left of it"
    assert not any(verify_shards(store))
    chosen = [0, 2, 1, 4]
    found, positions = KVReader(store).read_with_positions(chosen)
    assert positions is not None
    assert positions.shape == (4, 33)
    for row, sample in enumerate(chosen):
        places = [2 * k + 1 for k in range(kept[sample])]
        assert positions[row].tolist() == places + [-1] * (33 - kept[sample])
        expected = kv[:, :, sample, :, places]
        atol = 0 if codec == "raw" else 0.05
        assert torch.allclose(found[:, :, row, :, : kept[sample]].float(), expected.float(), atol=atol)
        assert not found[:, :, row, :, kept[sample] :].any()
    wide, far = KVReader(store).read_with_positions([1], 50)
    assert far is not None
    assert wide.shape[4] == 50
    assert far[0].tolist() == [1, 3] + [-1] * 48
