"""One student, several teachers: what is fused must be what each teacher alone would have taught."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from kvpipe.kvcache.align.aligner import Aligner, AlignerConfig, Direction
from kvpipe.kvcache.align.fusion import FixedFusion, Fusion, LearnedFusion, entropy
from kvpipe.kvcache.align.head_projection import KVSpace
from kvpipe.kvcache.align.layer_map import layer_map
from kvpipe.kvcache.align.teacher_view import TeacherView
from kvpipe.pipeline.aligned_teacher import AlignedTeacher
from kvpipe.pipeline.distiller import KVDistiller
from kvpipe.pipeline.loss_terms import POINTWISE, parse_kv_loss
from kvpipe.pipeline.losses import IGNORED
from kvpipe.pipeline.teacher_batches import for_teacher
from torch import Tensor
from transformers import PreTrainedModel

MakeModel = Callable[..., PreTrainedModel]
DIRECTIONS: list[Direction] = ["student-to-teacher", "teacher-to-student-frozen"]
SAMPLES, TOKENS = 3, 6
SPACES = [(KVSpace(3, 5), 3), (KVSpace(1, 7), 1), (KVSpace(2, 4), 5)]
"""Of the teachers, with their layers: the second has fewer than the student."""


def students_batch() -> dict[str, Tensor]:
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    input_ids = torch.randint(2, 40, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": input_ids, "attention_mask": mask, "labels": torch.where(mask.bool(), input_ids, IGNORED)}


def teachers_batch(number: int) -> dict[str, Tensor]:
    space, layers = SPACES[number]
    generator = torch.Generator().manual_seed(number + 1)
    return {
        "teacher_kv": torch.randn(layers, 2, SAMPLES, space.num_kv_heads, TOKENS, space.head_dim, generator=generator)
    }


def make_teacher(student: PreTrainedModel, number: int, direction: Direction) -> AlignedTeacher:
    config = student.config
    space, layers = SPACES[number]
    torch.manual_seed(number)
    own = KVSpace(config.num_key_value_heads, config.head_dim)
    aligner = Aligner(AlignerConfig("flat", direction, config.num_hidden_layers, own, space))
    return AlignedTeacher(TeacherView(layer_map("ratio", config.num_hidden_layers, layers)), aligner)


def fused_distiller(
    student: PreTrainedModel,
    numbers: Sequence[int],
    fusion: Fusion,
    direction: Direction = "student-to-teacher",
    kv_loss: str = "mse",
    router_entropy: float = 0.0,
) -> KVDistiller:
    teachers = [make_teacher(student, number, direction) for number in numbers]
    return KVDistiller(student, teachers, parse_kv_loss(kv_loss), 0.7, fusion, router_entropy)


def fused_batch(numbers: Sequence[int], **masks: Tensor) -> dict[str, Tensor]:
    batch = students_batch()
    for place, number in enumerate(numbers):
        own = teachers_batch(number)
        if (mask := masks.get(f"mask_{place}")) is not None:
            own["kv_mask"] = mask * batch["attention_mask"]
        batch |= for_teacher(place, own)
    return batch


def students_gradients(distiller: KVDistiller, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    distiller(**batch)["loss"].backward()
    return {n: p.grad for n, p in distiller.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kv_loss", [*POINTWISE, "mse:0.3,kava"])
def test_two_identical_teachers_are_one(make_model: MakeModel, direction: Direction, kv_loss: str) -> None:
    student = make_model()
    alone = KVDistiller(student, [make_teacher(student, 0, direction)], parse_kv_loss(kv_loss), 0.7)
    expected = alone(**students_batch(), **teachers_batch(0))
    gradients = students_gradients(alone, {**students_batch(), **teachers_batch(0)})
    twin = make_model()
    fused = fused_distiller(twin, [0, 0], FixedFusion([3.0, 1.0]), direction, kv_loss)
    found = fused(**fused_batch([0, 0]))
    for name in expected.keys() - {"target", "target_mask"}:
        torch.testing.assert_close(found[name], expected[name])
    assert found["fusion_weight_0"].item() == pytest.approx(0.75)
    own = students_gradients(fused, fused_batch([0, 0]))
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_order_of_teachers_changes_nothing_but_that_of_their_weights(
    make_model: MakeModel, direction: Direction
) -> None:
    weights = [1.0, 2.0, 5.0]
    outputs = []
    for order in ([0, 1, 2], [2, 0, 1]):
        fusion = FixedFusion([weights[number] for number in order])
        outputs.append(fused_distiller(make_model(), order, fusion, direction)(**fused_batch(order)))
    torch.testing.assert_close(outputs[1]["loss"], outputs[0]["loss"])
    found = [[float(output[f"fusion_weight_{k}"]) for k in range(3)] for output in outputs]
    assert found[1] == pytest.approx([found[0][number] for number in (2, 0, 1)])


def test_what_a_teacher_lacks_is_learned_from_the_others_alone(make_model: MakeModel) -> None:
    """Against the sum over tokens, one by one, in float64."""
    lacks = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    lacks[1], lacks[2, 3:] = 0, 0
    distiller = fused_distiller(make_model(), [0, 1], FixedFusion([1.0, 3.0]))
    batch = fused_batch([0, 1], mask_1=lacks)
    found = distiller(**batch)["kv"]
    _, compared, _ = distiller.compare(batch)
    total, count = 0.0, 0
    for sample in range(SAMPLES):
        for token in range(int(batch["attention_mask"][sample].sum())):
            errors = [
                (each.aligned[0] - each.aligned[1])[:, :, sample, :, token].double().square().mean().item()
                for each in compared
            ]
            shares = (0.25, 0.75) if lacks[sample, token] else (1.0, 0.0)
            total, count = total + sum(w * e for w, e in zip(shares, errors, strict=True)), count + 1
    assert found.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_of_a_sample_that_a_teacher_lacks_reaches_the_student(
    make_model: MakeModel, direction: Direction
) -> None:
    lacks = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    lacks[1] = 0
    distiller = fused_distiller(make_model(), [0, 1], FixedFusion([1.0, 1.0]), direction)
    batch = fused_batch([0, 1], mask_1=lacks)
    loud = batch["teacher_kv.1"].clone()
    loud[:, :, 1] = 1e6
    torch.testing.assert_close(distiller(**{**batch, "teacher_kv.1": loud})["loss"], distiller(**batch)["loss"])
    silent = batch | {"kv_mask.1": torch.zeros_like(lacks)}
    alone = fused_distiller(make_model(), [0, 1], FixedFusion([1.0, 0.0]), direction)
    torch.testing.assert_close(distiller(**silent)["loss"], alone(**silent)["loss"])


def test_averaged_targets_are_one_target_in_the_students_space(make_model: MakeModel) -> None:
    fusion = FixedFusion([1.0, 3.0])
    distiller = fused_distiller(make_model(), [0, 1], fusion, "teacher-to-student-frozen")
    batch = fused_batch([0, 1])
    targets = [each.aligned[1] for each in distiller.compare(batch)[1]]
    expected = 0.25 * targets[0] + 0.75 * targets[1]
    real = batch["attention_mask"].bool()
    found = distiller(**batch)["target"].movedim(4, 3)[:, :, real]
    torch.testing.assert_close(found, expected.movedim(4, 3)[:, :, real])


def test_a_router_trains_and_its_entropy_is_worth_what_it_is_told(make_model: MakeModel) -> None:
    student = make_model()
    features = student.config.num_hidden_layers * 2 * student.config.num_key_value_heads * student.config.head_dim
    losses = []
    for worth in (0.0, 0.5):
        torch.manual_seed(0)
        fusion = LearnedFusion(2, student.config.num_hidden_layers, features, "token")
        distiller = fused_distiller(student, [0, 1], fusion, router_entropy=worth)
        outputs = distiller(**fused_batch([0, 1]))
        outputs["loss"].backward()
        assert all(p.grad is not None and p.grad.any() for p in fusion.parameters())
        losses.append(outputs["loss"].item())
        weights = distiller.compare(fused_batch([0, 1]))[2]
        assert weights is not None
    assert losses[0] - losses[1] == pytest.approx(0.5 * entropy(weights).item(), rel=1e-4)


def test_left_alone_a_router_prefers_the_teacher_that_is_easier_to_follow(make_model: MakeModel) -> None:
    """Why entropy is there, and why a collapse is reported."""
    distiller = fused_distiller(make_model(), [0, 1], LearnedFusion(2, 2, 0, "layer"))
    batch = fused_batch([0, 1])
    batch["teacher_kv.1"] = batch["teacher_kv.1"] * 0.1
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        outputs = distiller(**batch)
        outputs["loss"].backward()
        optimizer.step()
    assert outputs["fusion_weight_1"].item() > 0.8


def test_targets_move_where_a_router_mixes_them(make_model: MakeModel) -> None:
    student = make_model()
    router = LearnedFusion(2, 2, 0, "layer")
    assert fused_distiller(student, [0, 1], router, "teacher-to-student-frozen").target_moves
    assert not fused_distiller(student, [0, 1], router).target_moves
    assert not fused_distiller(student, [0, 1], FixedFusion([1.0, 1.0]), "teacher-to-student-frozen").target_moves
