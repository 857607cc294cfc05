"""Which teacher layers a student layer learns from, and how much of each."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.align.layer_map import (
    LAYER_MAPS,
    LayerMap,
    cka_map,
    layer_map,
    ratio_map,
)
from kvpipe.kvcache.errors import ConfigError
from torch import Tensor

DEPTHS = st.integers(1, 130)
SHALLOW = st.integers(1, 12)
MEANS = LayerMap(((0.3, 0.7, 0.0, 0.0), (0.0, 0.2, 0.0, 0.8), (0.0, 0.0, 0.0, 1.0)))


def random_kv(layers: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(layers, 2, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


@given(DEPTHS, DEPTHS)
def test_every_student_layer_has_a_teacher_layer_that_is_there(student: int, teacher: int) -> None:
    layers = ratio_map(student, teacher)
    assert len(layers) == student
    assert all(0 <= layer < teacher for layer in layers)


@given(DEPTHS, DEPTHS)
def test_order_is_kept_and_the_last_learns_from_the_last(student: int, teacher: int) -> None:
    layers = ratio_map(student, teacher)
    assert all(a <= b for a, b in pairwise(layers))
    assert layers[-1] == teacher - 1


@given(DEPTHS)
def test_models_of_one_depth_pair_layer_by_layer(depth: int) -> None:
    assert ratio_map(depth, depth) == tuple(range(depth))


@given(DEPTHS, DEPTHS)
def test_a_shallower_student_uses_each_teacher_layer_once_at_most(student: int, teacher: int) -> None:
    layers = ratio_map(min(student, teacher), teacher)
    assert len(set(layers)) == len(layers)


@given(DEPTHS, DEPTHS)
def test_a_deeper_student_uses_every_teacher_layer(student: int, teacher: int) -> None:
    assert set(ratio_map(student + teacher, teacher)) == set(range(teacher))


@given(DEPTHS, DEPTHS)
def test_relative_depth_is_kept_within_half_a_teacher_layer(student: int, teacher: int) -> None:
    for layer, mapped in enumerate(ratio_map(student, teacher)):
        assert abs((mapped + 1) - (layer + 1) * teacher / student) <= 0.5 or mapped == 0


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(2, 4, (1, 3)), (1, 12, (11,)), (3, 28, (8, 18, 27)), (4, 2, (0, 0, 1, 1)), (5, 1, (0,) * 5)],
)
def test_known_maps(student: int, teacher: int, expected: tuple[int, ...]) -> None:
    assert ratio_map(student, teacher) == expected


@given(DEPTHS, DEPTHS)
def test_ratio_is_the_ratio_map(student: int, teacher: int) -> None:
    assert layer_map("ratio", student, teacher).one_to_one == ratio_map(student, teacher)


@pytest.mark.parametrize("name", LAYER_MAPS)
@given(depth=DEPTHS)
def test_every_strategy_pairs_models_of_one_depth_layer_by_layer(name: str, depth: int) -> None:
    assert layer_map(name, depth, depth) == LayerMap.identity(depth)


@pytest.mark.parametrize("name", LAYER_MAPS)
@given(student=SHALLOW, teacher=SHALLOW)
def test_every_strategy_keeps_the_order_of_the_layers(name: str, student: int, teacher: int) -> None:
    found = layer_map(name, student, teacher)
    assert (found.num_student_layers, found.num_teacher_layers) == (student, teacher)
    centres = [sum(j * weight for j, weight in enumerate(row)) for row in found.weights]
    assert all(a <= b + 1e-9 for a, b in pairwise(centres))


@pytest.mark.parametrize(
    ("name", "student", "teacher", "expected"),
    [
        ("skip", 6, 12, (0, 2, 4, 6, 8, 10)),
        ("skip", 3, 28, (0, 9, 18)),
        ("skip", 1, 12, (0,)),
        ("skip", 4, 2, (0, 0, 1, 1)),
        ("skip", 3, 2, (0, 0, 1)),
        ("last", 3, 28, (25, 26, 27)),
        ("last", 4, 2, (0, 0, 0, 1)),
        ("last", 5, 1, (0,) * 5),
    ],
)
def test_known_one_to_one_maps(name: str, student: int, teacher: int, expected: tuple[int, ...]) -> None:
    assert layer_map(name, student, teacher).one_to_one == expected


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (1, 4, ((0.25, 0.25, 0.25, 0.25),)),
        (2, 4, ((0.5, 0.5, 0.0, 0.0), (0.0, 0.0, 0.5, 0.5))),
        (2, 3, ((2 / 3, 1 / 3, 0.0), (0.0, 1 / 3, 2 / 3))),
        (4, 2, ((1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 1.0))),
        (3, 2, ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))),
    ],
)
def test_known_uniform_maps(student: int, teacher: int, expected: tuple[tuple[float, ...], ...]) -> None:
    assert layer_map("uniform", student, teacher).weights == expected


@given(DEPTHS, DEPTHS)
def test_in_a_uniform_map_every_teacher_layer_weighs_the_same(student: int, teacher: int) -> None:
    for column in zip(*layer_map("uniform", student, teacher).weights, strict=True):
        assert sum(column) == pytest.approx(student / teacher)


def test_an_unknown_strategy_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"expected ratio, skip, uniform, last, cka or a .json file, found best\. "):
        layer_map("best", 2, 4)


@pytest.mark.parametrize(
    "weights",
    [
        (),
        ((),),
        ((1.0, 0.0), (1.0,)),
        ((0.5, 0.4),),
        ((1.5, -0.5),),
        ((float("nan"), 1.0),),
        ((float("inf"), 0.0),),
        ((1e308, 1e308),),
        ((0.0, 0.0),),
    ],
)
def test_weights_that_are_no_means_are_refused(weights: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(ConfigError, match=r"^no layer map: expected .*, found [^\n]*--layer-map$"):
        LayerMap(weights)


def test_used_layers_are_those_with_weight() -> None:
    assert MEANS.used == (0, 1, 3)
    assert MEANS.one_to_one is None
    assert LayerMap.one_hot([3, 1, 1], 4).used == (1, 3)
    assert LayerMap.one_hot([3, 1, 1], 4).one_to_one == (3, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_layers_are_taken_bit_for_bit(dtype: torch.dtype) -> None:
    kv = random_kv(4, dtype)
    for layers in ([3, 1, 1], [0, 1], [1, 2, 3, 3], [0, 1, 2, 3]):
        found = LayerMap.one_hot(layers, 4).apply(kv)
        assert found.dtype == dtype
        assert torch.equal(found, torch.stack([kv[layer] for layer in layers]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_means_are_what_the_loop_says(dtype: torch.dtype) -> None:
    kv = random_kv(4, dtype)
    expected = torch.stack(
        [sum((weight * kv[j].double() for j, weight in enumerate(row)), torch.zeros(())) for row in MEANS.weights]
    )
    found = MEANS.apply(kv)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)


def test_autocast_does_not_round_means() -> None:
    kv = random_kv(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = MEANS.apply(kv)
    assert torch.equal(found, MEANS.apply(kv))


def test_layers_without_weight_do_not_matter() -> None:
    kv = random_kv(4)
    changed = kv.clone()
    changed[2] = float("nan")
    assert torch.equal(MEANS.apply(changed), MEANS.apply(kv))


def test_queries_are_mapped_like_kv() -> None:
    queries = random_kv(4)[:, 0]
    assert torch.equal(MEANS.apply(queries), MEANS.apply(random_kv(4))[:, 0])


def test_means_have_a_gradient() -> None:
    kv = random_kv(4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(MEANS.apply, [kv])


@pytest.mark.parametrize("name", LAYER_MAPS)
@given(student=SHALLOW, teacher=SHALLOW, data=st.data())
def test_a_store_of_the_used_layers_gives_the_same(name: str, student: int, teacher: int, data: st.DataObject) -> None:
    whole = layer_map(name, student, teacher)
    others = data.draw(st.sets(st.integers(0, teacher - 1)))
    kept = sorted({*whole.used, *others})
    kv = random_kv(teacher)
    assert torch.equal(whole.restrict(kept).apply(kv[kept]), whole.apply(kv))


def test_a_map_without_its_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        MEANS.restrict([0, 1])


def test_cka_takes_the_most_similar_layers_by_the_softmax_of_their_similarity() -> None:
    similarity = torch.tensor([[0.1, 0.7, 0.2, 0.8], [0.9, 0.2, 0.3, 0.1]])
    found = torch.tensor(cka_map(similarity, top_k=2, temperature=0.1).weights)
    expected = torch.zeros(2, 4)
    expected[0, [1, 3]] = torch.tensor([7.0, 8.0]).softmax(0)
    expected[1, [0, 2]] = torch.tensor([9.0, 3.0]).softmax(0)
    torch.testing.assert_close(found, expected)


def test_cka_with_one_layer_takes_the_most_similar_and_of_equals_the_first() -> None:
    assert cka_map(torch.tensor([[0.1, 0.7, 0.7], [0.5, 0.5, 0.5]]), top_k=1).one_to_one == (1, 0)


def test_cka_with_few_teacher_layers_takes_them_all() -> None:
    assert cka_map(torch.tensor([[0.4], [0.6]])).one_to_one == (0, 0)
