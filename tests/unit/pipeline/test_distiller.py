"""The module that trains: where its gradients go, and what one step costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kvpipe.kvcache.align.aligner import Aligner, AlignerConfig, Direction, Mode
from kvpipe.kvcache.align.head_projection import KVSpace
from kvpipe.kvcache.align.layer_map import layer_map
from kvpipe.kvcache.align.teacher_view import TeacherView
from kvpipe.pipeline.aligned_teacher import AlignedTeacher
from kvpipe.pipeline.distiller import KVDistiller
from kvpipe.pipeline.loss_terms import parse_kv_loss
from kvpipe.pipeline.losses import IGNORED, kv_mse
from torch import Tensor
from transformers import PreTrainedModel

MakeModel = Callable[..., PreTrainedModel]
TEACHER_LAYERS, TEACHER = 3, KVSpace(3, 5)
MODES: list[Mode] = ["structured", "flat"]
DIRECTIONS: list[Direction] = ["student-to-teacher", "teacher-to-student-joint"]


def make_batch(seed: int = 0, pad: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    input_ids = torch.randint(2, 40, mask.shape, generator=generator) * mask
    labels = torch.where(mask.bool(), input_ids, IGNORED)
    labels[:, :2] = IGNORED
    shape = (TEACHER_LAYERS, 2, 2, TEACHER.num_kv_heads, 6, TEACHER.head_dim)
    teacher_kv = torch.randn(shape, generator=generator)
    padded = torch.nn.functional.pad
    return {
        "input_ids": padded(input_ids, (0, pad)),
        "attention_mask": padded(mask, (0, pad)),
        "labels": padded(labels, (0, pad), value=IGNORED),
        "teacher_kv": padded(teacher_kv, (0, 0, 0, pad)),
    }


def make_distiller(
    student: PreTrainedModel, mode: Mode, direction: Direction = "student-to-teacher", kv_weight: float = 1.0
) -> KVDistiller:
    config = student.config
    torch.manual_seed(1)
    aligner = Aligner(
        AlignerConfig(
            mode=mode,
            direction=direction,
            num_layers=config.num_hidden_layers,
            student=KVSpace(config.num_key_value_heads, config.head_dim),
            teacher=TEACHER,
        )
    )
    return KVDistiller(student, [AlignedTeacher(ratio_view(student), aligner)], parse_kv_loss("mse"), kv_weight)


def ratio_view(student: PreTrainedModel) -> TeacherView:
    return TeacherView(layer_map("ratio", student.config.num_hidden_layers, TEACHER_LAYERS))


def without_kv(student: PreTrainedModel) -> KVDistiller:
    return KVDistiller(student, [AlignedTeacher(ratio_view(student))])


def kv_loss(distiller: KVDistiller, batch: dict[str, Tensor]) -> Tensor:
    """The KV part of the loss, with its graph and nothing of the cross-entropy's."""
    assert distiller.teacher.aligner is not None
    _, student_kv = distiller.student_forward(batch["input_ids"], batch["attention_mask"])
    teacher_kv = distiller.teacher.view.teacher(batch["teacher_kv"])
    return kv_mse(*distiller.teacher.aligner(student_kv, teacher_kv), batch["attention_mask"])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_the_kv_loss_alone_reaches_the_students_keys_and_values(
    make_model: MakeModel, mode: Mode, direction: Direction
) -> None:
    distiller, batch = make_distiller(make_model(), mode, direction), make_batch()
    named = dict(distiller.student.named_parameters())
    gradients = torch.autograd.grad(kv_loss(distiller, batch), list(named.values()), allow_unused=True)
    found = dict(zip(named, gradients, strict=True))
    for layer in range(2):
        for name in ("k_proj", "v_proj"):
            gradient = found[f"model.layers.{layer}.self_attn.{name}.weight"]
            assert gradient is not None
            assert float(gradient.abs().sum()) > 0
    # The KV of the last layer knows nothing of what comes after it.
    assert found["model.layers.1.mlp.down_proj.weight"] is None


@pytest.mark.parametrize("mode", MODES)
def test_what_the_kv_loss_adds_to_the_gradient_is_its_own_gradient(make_model: MakeModel, mode: Mode) -> None:
    batch = make_batch()

    def gradients(loss_of: Callable[[KVDistiller], Tensor], kv_weight: float) -> dict[str, Tensor]:
        distiller = make_distiller(make_model(), mode, kv_weight=kv_weight)
        loss_of(distiller).backward()
        return {n: p.grad for n, p in distiller.student.named_parameters() if p.grad is not None}

    whole = gradients(lambda d: d(**batch)["loss"], 0.7)
    ce_only = gradients(lambda d: d(**batch)["loss"], 0.0)
    kv_only = gradients(lambda d: kv_loss(d, batch), 1.0)
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"):
        torch.testing.assert_close(whole[name] - ce_only[name], 0.7 * kv_only[name], rtol=1e-3, atol=1e-5)
        assert float(kv_only[name].norm()) > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_the_sum_of_its_parts(make_model: MakeModel, mode: Mode) -> None:
    distiller, batch = make_distiller(make_model(), mode, kv_weight=0.3), make_batch()
    outputs = distiller(**batch)
    torch.testing.assert_close(outputs["loss"].detach(), outputs["ce"] + 0.3 * outputs["kv"])
    torch.testing.assert_close(outputs["kv"], kv_loss(distiller, batch).detach())
    assert not any(outputs[part].requires_grad for part in ("ce", "kv", "target"))


@pytest.mark.parametrize("mode", [*MODES, None])
def test_one_step_is_one_student_forward(make_model: MakeModel, mode: Mode | None) -> None:
    student = make_model()
    calls: list[str] = []
    student.register_forward_hook(lambda *_: calls.append("forward"))
    distiller = make_distiller(student, mode) if mode else without_kv(student)
    distiller(**make_batch())["loss"].backward()
    assert calls == ["forward"]


def test_without_an_aligner_the_loss_is_the_models_own(make_model: MakeModel) -> None:
    student, batch = make_model(), make_batch()
    distiller = without_kv(student)
    assert [name for name, _ in distiller.named_parameters() if "aligner" in name] == []
    outputs = distiller(**batch)
    assert set(outputs) == {"loss", "ce"}
    plain = student(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(outputs["loss"], plain)


@pytest.mark.parametrize("mode", MODES)
def test_the_cross_entropy_is_the_same_with_and_without_kv(make_model: MakeModel, mode: Mode) -> None:
    batch = make_batch()
    with_kv = make_distiller(make_model(), mode)(**batch)["ce"]
    without = without_kv(make_model())(**batch)["ce"]
    torch.testing.assert_close(with_kv, without)


@pytest.mark.parametrize("mode", MODES)
def test_the_fixed_target_neither_needs_nor_gets_a_gradient(make_model: MakeModel, mode: Mode) -> None:
    batch = make_batch()
    batch["teacher_kv"].requires_grad_()
    distiller = make_distiller(make_model(), mode)
    with_leaf = kv_loss(distiller, batch)
    frozen = {**batch, "teacher_kv": batch["teacher_kv"].detach()}
    assert torch.equal(with_leaf, kv_loss(distiller, frozen))
    distiller(**frozen)["loss"].backward()
    assert batch["teacher_kv"].grad is None
    assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_the_captured_kv_is_what_the_model_would_cache(make_model: MakeModel) -> None:
    student, batch = make_model(), make_batch()
    logits, kv = without_kv(student).student_forward(batch["input_ids"], batch["attention_mask"])
    plain = student(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=True)
    torch.testing.assert_close(logits, plain.logits)
    for layer, cached in enumerate(plain.past_key_values.layers):
        torch.testing.assert_close(kv[layer, 0], cached.keys)
        torch.testing.assert_close(kv[layer, 1], cached.values)


@pytest.mark.parametrize("mode", MODES)
def test_more_padding_changes_no_part_of_the_loss(make_model: MakeModel, mode: Mode) -> None:
    distiller = make_distiller(make_model(), mode)
    short, long = distiller(**make_batch()), distiller(**make_batch(pad=5))
    for part in ("loss", "ce", "kv"):
        torch.testing.assert_close(short[part], long[part])


def test_the_order_of_the_batch_changes_nothing(make_model: MakeModel) -> None:
    distiller, batch = make_distiller(make_model(), "structured"), make_batch()
    turned = {name: tensor.flip(2 if name == "teacher_kv" else 0) for name, tensor in batch.items()}
    torch.testing.assert_close(distiller(**turned)["loss"], distiller(**batch)["loss"])


@pytest.mark.parametrize("mode", MODES)
def test_a_few_steps_lower_the_kv_loss_on_a_fixed_target(make_model: MakeModel, mode: Mode) -> None:
    distiller, batch = make_distiller(make_model(), mode), make_batch()
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        outputs = distiller(**batch)
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        losses.append(outputs["kv"].item())
        assert torch.equal(outputs["target"], distiller.teacher.view.teacher(batch["teacher_kv"]))
    assert losses[-1] < 0.5 * losses[0]
