"""A profile's numbers against direct computation on all tokens at once, in float64."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.align.closed_form import RIDGE_ALPHA
from kvpipe.kvcache.align.layer_map import LayerMap, cka_map
from kvpipe.kvcache.errors import ConfigError, ModelError
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.alignment import build_distiller, kv_dataset
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.kv_statistics import KVStatistics, finite_tokens
from kvpipe.pipeline.map_quality import BACKWARD, MAPS
from kvpipe.pipeline.profile import Profile, profile_student
from kvpipe.pipeline.profile_advice import advice
from kvpipe.pipeline.progress import progress_bar
from kvpipe.pipeline.student_text import StudentText, teachers_tokens
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

MakeModel = Callable[..., PreTrainedModel]
MakeStore = Callable[..., tuple[KVStore, Any]]

LENGTHS = [12, 9, 20, 7, 7, 15, 18, 11, 6, 6, 14, 10]
CHOSEN, HALF = [0, 1, 2, 5, 6, 7], 3
"""The training samples: two of every five are held out."""

LAYERS, TEACHER, STUDENT = (0, 2), (2, 4), (2, 6)
"""The ratio map of two student layers over three of the teacher's, and heads and channels of either side."""

CONFIG = DistillConfig(mode="flat", layer_map=json.dumps({"layers": list(LAYERS)}))


def look(store: KVStore, student: PreTrainedModel, samples: int = 6, **changes: Any) -> Profile:
    text = changes.pop("text", teachers_tokens(store))
    silent = progress_bar(Console(file=io.StringIO()))
    return profile_student(replace(CONFIG, **changes), store, student, text, samples=samples, progress=silent)


def rotated(store: KVStore) -> KVStore:
    """The same store, of a teacher whose rotation is known."""
    store = KVStore.open(store.path)
    store.manifest = replace(store.manifest, rope={**store.manifest.rope, "layout": "half"})
    return store


@pytest.fixture(scope="module")
def pair(make_segmented_store: MakeStore) -> tuple[KVStore, list[Tensor]]:
    return make_segmented_store(LENGTHS)


@pytest.fixture
def sides(pair: tuple[KVStore, list[Tensor]], make_model: MakeModel) -> tuple[list[Tensor], list[Tensor]]:
    """Rows `[L, 2, N, F]` of the student's and the teacher's tokens, one tensor a sample, without any batch."""
    store, kv = pair
    model = make_model()
    own = []
    for index in CHOSEN:
        ids = torch.from_numpy(store.input_ids[index, : LENGTHS[index]].astype(np.int64))[None]
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        own.append(torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]))
    return [rows(sample) for sample in own], [rows(kv[index]) for index in CHOSEN]


def rows(kv: Tensor) -> Tensor:
    return kv.double().transpose(2, 3).flatten(3)


def together(samples: list[Tensor]) -> Tensor:
    return torch.cat(samples, dim=2)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def effective_rank(x: Tensor) -> float:
    share = torch.linalg.svdvals(centred(x))
    share = share / share.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def cka(x: Tensor, y: Tensor) -> float:
    x, y = centred(x), centred(y)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def ridge_map(x: Tensor, y: Tensor) -> Tensor:
    x, y = centred(x), centred(y)
    penalty = RIDGE_ALPHA * x.square().sum() / x.shape[1]
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]).double(), x.T @ y)


def kronecker_map(weight: Tensor, terms: int) -> Tensor:
    """The nearest sum of Kronecker products, entry by entry."""
    (heads, dim), (other_heads, other_dim) = STUDENT, TEACHER
    arranged = torch.zeros(heads * other_heads, dim * other_dim).double()
    for h in range(heads):
        for g in range(other_heads):
            block = weight[h * dim : (h + 1) * dim, g * other_dim : (g + 1) * other_dim]
            arranged[h * other_heads + g] = block.flatten()
    arranged = low_rank(arranged, terms)
    found = torch.zeros_like(weight)
    for h in range(heads):
        for g in range(other_heads):
            block = arranged[h * other_heads + g].view(dim, other_dim)
            found[h * dim : (h + 1) * dim, g * other_dim : (g + 1) * other_dim] = block
    return found


def low_rank(weight: Tensor, rank: int) -> Tensor:
    left, scale, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * scale[:rank] @ right[:rank]


# 96 weights are three terms of 6 * 4 + 2 * 2; those of one term are rank 1.
REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda weight: weight,
    "structured": lambda weight: kronecker_map(weight, 1),
    "structured at flat's size": lambda weight: kronecker_map(weight, 3),
    "flat at structured's size": lambda weight: low_rank(weight, 1),
}


def held_out_r2(x: list[Tensor], y: list[Tensor], make: Callable[[Tensor], Tensor], heads: int) -> list[float]:
    """By head; fitted to the first half, with targets scaled by its moments."""
    fit, test = ((torch.cat(x[part]), torch.cat(y[part])) for part in (slice(HALF), slice(HALF, None)))
    weight = make(ridge_map(*fit))
    prediction = (test[0] - fit[0].mean(0)) @ weight + fit[1].mean(0)
    by_channel = 1 - (test[1] - prediction).square().sum(0) / centred(test[1]).square().sum(0)
    return by_channel.unflatten(0, (heads, -1)).mean(1).tolist()


def normalised(y: list[Tensor]) -> list[Tensor]:
    fit = torch.cat(y[:HALF])
    return [(sample - fit.mean(0)) / fit.std(0, correction=0) for sample in y]


def test_maps_explain_as_much_of_held_out_tokens_as_computed_directly(
    pair: tuple[KVStore, Any], sides: tuple[list[Tensor], list[Tensor]], make_model: MakeModel
) -> None:
    found = look(pair[0], make_model())
    assert REFERENCES.keys() == MAPS.keys()
    for layer, teacher_layer in enumerate(LAYERS):
        for kind in range(2):
            x = [sample[layer, kind] for sample in sides[0]]
            y = normalised([sample[teacher_layer, kind] for sample in sides[1]])
            for name, make in REFERENCES.items():
                expected = held_out_r2(x, y, make, TEACHER[0])
                assert found.map_named(name).r2[layer][kind] == pytest.approx(expected, rel=1e-3, abs=1e-4), name
            expected = held_out_r2(y, x, lambda weight: weight, STUDENT[0])
            assert found.map_named(BACKWARD).r2[layer][kind] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    flat = found.map_named("flat")
    assert flat.mean_r2 == pytest.approx(np.mean(flat.r2, axis=(0, 2)))
    assert [quality.parameters for quality in found.maps] == [
        4 * (size + bias) for size, bias in ((96, 8), (28, 8), (84, 8), (20, 8), (96, 12))
    ]


def test_similarity_and_statistics_are_those_of_all_tokens(
    pair: tuple[KVStore, Any], sides: tuple[list[Tensor], list[Tensor]], make_model: MakeModel
) -> None:
    found = look(pair[0], make_model())
    student, teacher = (together(side) for side in sides)
    assert (found.samples, found.tokens) == (6, student.shape[2])
    assert found.held_out_tokens == together(sides[0][HALF:]).shape[2]
    by_kind = torch.tensor(
        [[[cka(student[i, k], teacher[j, k]) for j in range(3)] for i in range(2)] for k in range(2)]
    ).double()
    assert np.allclose([found.similarity.key, found.similarity.value], by_kind, rtol=1e-4)
    assert np.allclose(found.similarity.mean, by_kind.mean(0), rtol=1e-4)
    assert found.similarity.most_similar == tuple(by_kind.mean(0).argmax(1).tolist())
    assert np.allclose(found.similarity.layer_map.weights, cka_map(by_kind.mean(0)).weights, rtol=1e-3)
    assert found.layer_map == LayerMap.one_hot(LAYERS, 3)
    for side, tokens, (heads, dim) in ((found.student, student, STUDENT), (found.teacher, teacher, TEACHER)):
        assert (side.num_kv_heads, side.head_dim, side.nonfinite) == (heads, dim, 0)
        assert side.layers == tuple(range(len(tokens)))
        for place, each in enumerate(side.statistics):
            x = tokens[place // 2, place % 2]
            assert (each.layer, each.kind) == (place // 2, ("key", "value")[place % 2])
            assert each.mean_norm == pytest.approx(float(x.unflatten(1, (heads, dim)).norm(dim=2).mean()), rel=1e-4)
            assert each.effective_rank == pytest.approx(effective_rank(x), rel=1e-3)


@pytest.mark.parametrize("start", ["random", "closed-form"])
@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_the_loss_at_the_start_is_that_of_training(
    pair: tuple[KVStore, Any], make_model: MakeModel, mode: Any, start: Any
) -> None:
    store, student = pair[0], make_model()
    found = look(store, student).start_loss[mode]
    config, text = replace(CONFIG, mode=mode, start=start), teachers_tokens(store)
    distiller = build_distiller(config, store, student, text, CHOSEN[:HALF])
    with torch.no_grad():
        loss = float(distiller(**kv_dataset(config, store, text).__getitems__(CHOSEN[HALF:]))["kv"])
    assert (found.random if start == "random" else found.closed_form) == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "structured", "share_layers": True, "share_dim_proj": False},
        {"mode": "flat", "direction": "teacher-to-student-frozen", "closed_form": "procrustes"},
        {"mode": "identity", "kv_loss": "relation"},
        {"mode": "none"},
    ],
)
def test_a_profile_is_of_what_is_settled_before_a_map_is_chosen(
    pair: tuple[KVStore, Any], make_model: MakeModel, changes: dict[str, Any]
) -> None:
    plain, found = look(pair[0], make_model()), look(pair[0], make_model(), **changes)
    assert replace(found, steps={}) == replace(plain, steps={})


@pytest.mark.parametrize("changes", [{"layer_map": "cka"}, {"key_space": "pre-rope"}, {"kv_segments": "answer"}])
def test_a_profile_follows_the_recipe(
    pair: tuple[KVStore, Any], make_model: MakeModel, changes: dict[str, str]
) -> None:
    store = rotated(pair[0])
    plain, found = look(store, make_model()), look(store, make_model(), **changes)
    assert found.map_named("flat").r2 != plain.map_named("flat").r2
    if "layer_map" in changes:
        # Fitted to the first half, as the maps are.
        half = look(store, make_model(), samples=3)
        assert np.allclose(found.layer_map.weights, half.similarity.layer_map.weights, rtol=1e-6)
    if "kv_segments" in changes:
        assert found.tokens == 2 * len(CHOSEN)


def test_only_copies_are_trained_and_counted(pair: tuple[KVStore, Any], make_model: MakeModel) -> None:
    student = make_model()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = look(pair[0], student)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    own = sum(parameter.numel() for parameter in student.parameters())
    aligners = {"none": 0, "flat": 4 * 104, "structured": 4 * 36}
    assert {mode: cost.parameters - own for mode, cost in found.steps.items()} == aligners
    for cost in found.steps.values():
        assert cost.batch_size == len(CHOSEN)
        assert cost.seconds > 0
        # Weights, gradients and two moments of four bytes; Adam counts its steps beside them.
        assert 0 <= cost.state_bytes - 16 * cost.parameters < 0.01 * cost.state_bytes


@given(seed=st.integers(0, 1000), cut=st.integers(1, 5))
def test_statistics_do_not_depend_on_batches_or_padding(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(2, 2, 6, 2, 7, 3, generator=generator)
    mask = (torch.rand(6, 7, generator=generator) < 0.7).long()
    mask[:, 0] = 1
    whole, parts = KVStatistics(), KVStatistics()
    whole.update(kv, mask)
    dirty = torch.where(mask.bool()[None, None, :, None, :, None], kv, float("nan"))
    for part in (slice(cut), slice(cut, None)):
        parts.update(dirty[:, :, part], mask[part])
    for one, other in zip(whole.layers([4, 9]), parts.layers([4, 9]), strict=True):
        assert (one.layer, one.kind, one.outliers) == (other.layer, other.kind, other.outliers)
        assert one.mean_norm == pytest.approx(other.mean_norm)
        assert one.effective_rank == pytest.approx(other.effective_rank)


def test_an_outlier_varies_more_than_six_times_the_median_channel() -> None:
    kv = torch.tensor([-1.0, 1.0]).repeat(10)[:, None].expand(2, 2, 1, 3, 20, 5).clone()
    kv[0, 0, :, 1, :, 4] *= 6.1
    kv[0, 0, :, 2, :, 0] *= 5.9
    kv[1, 1, :, 0, :, 2] *= 100
    kv[0, 1, :, 0, :, 0] += 100
    statistics = KVStatistics()
    statistics.update(kv, torch.ones(1, 20, dtype=torch.long))
    assert [each.outliers for each in statistics.layers([0, 1])] == [((1, 4),), (), (), ((0, 2),)]


def test_tokens_with_a_number_that_is_none_are_counted_and_left_out() -> None:
    kv = torch.zeros(2, 2, 2, 3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    kv[1, 0, 0, 2, 1, 3] = float("nan")
    kv[0, 1, 1, 0, 3, :2] = float("inf")
    kv[0, 0, 0, 0, 3, 0] = float("nan")
    finite, count = finite_tokens(kv, mask)
    assert finite.tolist() == [[1, 0, 1, 0], [1, 1, 1, 0]]
    assert count == 3


def test_a_student_without_a_finite_number_is_refused(pair: tuple[KVStore, Any], make_model: MakeModel) -> None:
    student = make_model()
    with torch.no_grad():
        student.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"too few tokens to compare: expected finite KV .* 0 tokens in one half"):
        look(pair[0], student)


@pytest.mark.parametrize("samples", [-3, 0, 1])
def test_one_sample_has_no_two_halves(pair: tuple[KVStore, Any], make_model: MakeModel, samples: int) -> None:
    with pytest.raises(ConfigError, match=r"expected at least 2, .* Raise --samples"):
        look(pair[0], make_model(), samples=samples)


def test_the_share_of_aligned_tokens_is_that_of_the_samples(make_store: MakeStore, make_model: MakeModel) -> None:
    store = rotated(make_store([8] * 8, dtype=torch.float32, num_layers=3)[0])
    spans = store.spans.copy()
    spans[:, 6:8] += 10**6
    own = StudentText(store.input_ids % 40, store.segment_ids, store.length, spans)
    found = look(store, make_model(), text=own)
    assert (found.token_coverage, found.one_to_one_share, found.tokens) == (0.75, 0.75, 4 * 6)
    same = look(store, make_model(), text=replace(own, spans=None))
    assert (same.token_coverage, same.one_to_one_share, same.tokens) == (1.0, 1.0, 4 * 8)


def test_a_profile_is_strict_json(pair: tuple[KVStore, Any], make_model: MakeModel) -> None:
    found = look(pair[0], make_model())
    document = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert document["similarity"]["layer_map"]["weights"] == [list(row) for row in found.similarity.layer_map.weights]
    assert [quality["name"] for quality in document["maps"]] == [*MAPS, BACKWARD]


def test_the_advice_names_the_kind_of_the_higher_r2(pair: tuple[KVStore, Any], make_model: MakeModel) -> None:
    found = look(pair[0], make_model())
    scores = {"flat": 0.5, "structured": 0.2, "structured at flat's size": 0.7, "flat at structured's size": 0.205}
    maps = [replace(each, mean_r2=(scores.get(each.name, 0.0),) * 2) for each in found.maps]
    said = advice(replace(found, maps=tuple(maps), random_student=False))
    assert said[0].startswith("Most similar layers, by CKA: student layer 0 from ")
    assert said[1] == (
        "Held-out R2: flat is higher than structured (0.50 against 0.20). At flat's size, structured is higher than "
        "flat (0.70 against 0.50); at structured's size, flat and structured are alike (0.20 and 0.20)."
    )
    assert "need not predict the trained student" in said[2]
    assert len(said) == 3
    assert "starts at random" in advice(replace(found, random_student=True))[3]
