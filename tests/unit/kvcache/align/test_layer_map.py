"""Which teacher layer a student layer learns from."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.align.layer_map import ratio_map, select_layers
from kvpipe.kvcache.errors import ConfigError

DEPTHS = st.integers(1, 130)


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", (0, 1, 2, 3)),
        ("1,3", (1, 3)),
        ("3, 1,1", (1, 3)),
        ("0-2", (0, 1, 2)),
        ("0,2-3", (0, 2, 3)),
        ("ratio:2", (1, 3)),
        ("ratio:4", (0, 1, 2, 3)),
    ],
)
def test_layers_are_named(text: str, expected: tuple[int, ...]) -> None:
    assert select_layers(text, 4) == expected


@given(DEPTHS, DEPTHS)
def test_a_student_maps_onto_the_layers_kept_for_it_as_onto_all(student: int, teacher: int) -> None:
    student = min(student, teacher)
    kept = select_layers(f"ratio:{student}", teacher)
    assert [kept[layer] for layer in ratio_map(student, len(kept))] == list(ratio_map(student, teacher))


@pytest.mark.parametrize("text", ["", "4", "-1", "1-9", "3-1", "x", "1,,2", "ratio:0", "ratio:5", "ratio:x", "1.5"])
def test_layers_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no such layers: expected .*, found .*Mend --layers"):
        select_layers(text, 4)
