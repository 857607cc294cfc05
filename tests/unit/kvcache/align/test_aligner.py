"""The aligner: which side moves, how the teacher is normalised, and that a saved one comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kvpipe.kvcache.align.aligner import Aligner, AlignerConfig, Direction, Mode
from kvpipe.kvcache.align.head_projection import KVSpace
from kvpipe.kvcache.align.normalisation import Normalisation
from kvpipe.kvcache.errors import ConfigError
from torch import Tensor

STUDENT, TEACHER = KVSpace(2, 6), KVSpace(3, 4)
LAYERS = 2
MODES: list[Mode] = ["structured", "flat", "flat-global", "bottleneck"]
DIRECTIONS: list[Direction] = ["student-to-teacher", "teacher-to-student-frozen", "teacher-to-student-joint"]
CONFIG = AlignerConfig("structured", "student-to-teacher", LAYERS, STUDENT, TEACHER)

BOTH = pytest.mark.parametrize("direction", DIRECTIONS)
EITHER = pytest.mark.parametrize("mode", MODES)


def make_aligner(mode: Mode, direction: Direction, seed: int = 0) -> Aligner:
    torch.manual_seed(seed)
    return Aligner(replace(CONFIG, mode=mode, direction=direction, size=3 if mode == "bottleneck" else None))


def kv_pair(seed: int = 0, batch: int = 2, tokens: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(LAYERS, 2, batch, STUDENT.num_kv_heads, tokens, STUDENT.head_dim, generator=generator)
    teacher = torch.randn(LAYERS, 2, batch, TEACHER.num_kv_heads, tokens, TEACHER.head_dim, generator=generator)
    return student, 3 * teacher + 1


def moments(kv: Tensor) -> tuple[Tensor, Tensor]:
    return kv.mean((2, 4), keepdim=True), kv.std((2, 4), keepdim=True, correction=0)


@BOTH
@EITHER
def test_prediction_and_target_lie_in_the_space_of_the_side_that_stays(mode: Mode, direction: Direction) -> None:
    student, teacher = kv_pair()
    prediction, target = make_aligner(mode, direction)(student, teacher)
    space = TEACHER if direction == "student-to-teacher" else STUDENT
    expected = (LAYERS, 2, 2, space.num_kv_heads, 5, space.head_dim)
    assert prediction.shape == target.shape == expected


@BOTH
@EITHER
def test_the_teacher_is_normalised(mode: Mode, direction: Direction) -> None:
    aligner = make_aligner(mode, direction)
    student, teacher = kv_pair(tokens=40)
    mean, std = moments(teacher)
    aligner.normalise_teacher.set_moments(mean, std)
    prediction, target = aligner(student, teacher)
    normalised = (teacher - mean) / std
    if direction == "student-to-teacher":
        torch.testing.assert_close(target, normalised)
        torch.testing.assert_close(prediction, aligner.projection(student))
    else:
        torch.testing.assert_close(target, aligner.projection(normalised))
        assert torch.equal(prediction, student)


@EITHER
def test_a_frozen_target_lies_in_the_space_of_the_normalised_student(mode: Mode) -> None:
    """Else the largest channels, mostly of keys, would be all that counts."""
    aligner = make_aligner(mode, "teacher-to-student-frozen")
    assert isinstance(aligner.normalise_student, Normalisation)
    student, teacher = kv_pair(tokens=40)
    student[:, 0] *= 30
    mean, std = moments(student)
    aligner.normalise_student.set_moments(mean, std)
    prediction, target = aligner(student, teacher)
    torch.testing.assert_close(prediction, (student - mean) / std)
    torch.testing.assert_close(target, aligner.projection(teacher))


@BOTH
def test_a_constant_channel_is_centred_and_not_blown_up(direction: Direction) -> None:
    aligner = make_aligner("flat", direction)
    student, teacher = kv_pair()
    teacher[:, :, :, 1, :, 2] = 7.5
    aligner.normalise_teacher.set_moments(*moments(teacher))
    constant = aligner.normalise_teacher(teacher)
    assert torch.equal(constant[:, :, :, 1, :, 2], torch.zeros(2, 2, 2, 5))
    assert all(torch.isfinite(side).all() for side in aligner(student, teacher))


@EITHER
def test_a_fixed_target_depends_on_neither_the_aligner_nor_the_student(mode: Mode) -> None:
    (student, teacher), (other, _) = kv_pair(), kv_pair(seed=5)
    first, second = (make_aligner(mode, "student-to-teacher", seed) for seed in (0, 1))
    target = first(student, teacher)[1]
    assert torch.equal(target, second(other, teacher)[1])
    assert not target.requires_grad
    assert target.grad_fn is None


@EITHER
def test_a_joint_target_moves_with_the_aligner(mode: Mode) -> None:
    student, teacher = kv_pair()
    aligner = make_aligner(mode, "teacher-to-student-joint")
    prediction, target = aligner(student, teacher)
    assert target.requires_grad
    assert not prediction.requires_grad
    assert not torch.equal(target, make_aligner(mode, "teacher-to-student-joint", seed=1)(student, teacher)[1])


@BOTH
@EITHER
def test_permuting_the_batch_permutes_both_sides(mode: Mode, direction: Direction) -> None:
    aligner = make_aligner(mode, direction)
    student, teacher = kv_pair(batch=4)
    order = torch.tensor([2, 0, 3, 1])
    whole = aligner(student, teacher)
    for permuted, side in zip(aligner(student[:, :, order], teacher[:, :, order]), whole, strict=True):
        torch.testing.assert_close(permuted, side[:, :, order])


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_map_is_not_trained(mode: Mode) -> None:
    aligner = make_aligner(mode, "teacher-to-student-frozen")
    assert not any(parameter.requires_grad for parameter in aligner.parameters())
    assert not aligner(*kv_pair())[1].requires_grad


def test_only_a_joint_target_moves() -> None:
    assert [make_aligner("flat", direction).target_moves for direction in DIRECTIONS] == [False, False, True]


def test_equal_shapes_are_compared_as_they_are() -> None:
    _, teacher = kv_pair(tokens=40)
    aligner = Aligner(replace(CONFIG, mode="identity", student=TEACHER))
    aligner.normalise_teacher.set_moments(*moments(teacher))
    prediction, target = aligner(teacher + 1, teacher)
    torch.testing.assert_close(prediction, (teacher + 1 - moments(teacher)[0]) / moments(teacher)[1])
    torch.testing.assert_close(target, (teacher - moments(teacher)[0]) / moments(teacher)[1])
    assert list(aligner.parameters()) == []


def test_unequal_shapes_cannot_be_compared_as_they_are() -> None:
    with pytest.raises(ConfigError, match=r"expected 3 KV heads of 4 channels, found 2 of 6\. Choose --mode"):
        Aligner(replace(CONFIG, mode="identity"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_store_is_compared_in_the_students_precision(dtype: torch.dtype) -> None:
    student, teacher = kv_pair()
    for side in make_aligner("flat", "student-to-teacher")(student, teacher.to(dtype)):
        assert side.dtype == torch.float32


@BOTH
@EITHER
def test_a_saved_aligner_comes_back(mode: Mode, direction: Direction, tmp_path: Path) -> None:
    aligner = make_aligner(mode, direction)
    student, teacher = kv_pair()
    aligner.normalise_teacher.set_moments(*moments(teacher))
    aligner.save(tmp_path)
    torch.manual_seed(99)
    loaded = Aligner.load(tmp_path)
    assert loaded.config == aligner.config
    for side, again in zip(aligner(student, teacher), loaded(student, teacher), strict=True):
        assert torch.equal(side, again)


def test_every_option_of_a_structured_aligner_is_saved(tmp_path: Path) -> None:
    config = replace(CONFIG, share_dim_proj=False, share_layers=True, start="uniform", size=3, closed_form="procrustes")
    Aligner(config).save(tmp_path)
    assert Aligner.load(tmp_path).config == config
    assert json.loads((tmp_path / "aligner.json").read_text())["size"] == 3


def test_the_normalisation_is_not_trained() -> None:
    names = {name for name, _ in make_aligner("flat", "student-to-teacher").named_parameters()}
    assert names == {"projection.factors.0", "projection.bias"}
