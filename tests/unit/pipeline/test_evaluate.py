"""Evaluation in batches against plain loops over single, unpadded samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kvpipe.kvcache.align.aligner import Aligner, AlignerConfig, Mode
from kvpipe.kvcache.align.head_projection import KVSpace
from kvpipe.kvcache.align.layer_map import LayerMap
from kvpipe.kvcache.align.teacher_view import TeacherView
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline import evaluate
from kvpipe.pipeline.aligned_teacher import AlignedTeacher
from kvpipe.pipeline.distiller import KVDistiller
from kvpipe.pipeline.evaluate import evaluate_answers, evaluate_tokens
from kvpipe.pipeline.kv_moments import teacher_moments
from kvpipe.pipeline.student_text import teachers_tokens
from kvpipe.pipeline.teacher_weights import MeanWeights
from kvpipe.pipeline.training_data import KVDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

LENGTHS = [9, 33, 4, 20, 12, 5, 26, 11]
LAYER_MAP = (1, 2)
TEACHER = KVSpace(2, 4)
ALL = list(range(len(LENGTHS)))

MakeModel = Callable[..., PreTrainedModel]
Stored = tuple[KVStore, list[Tensor]]


def reference_cka(x: Tensor, y: Tensor) -> float:
    """Kornblith et al. (2019), equation 3, on all tokens at once."""
    a, b = (side.double().numpy() - side.double().numpy().mean(0) for side in (x, y))
    return float(np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)))


@pytest.fixture
def stored(make_segmented_store: Callable[..., Stored]) -> Stored:
    return make_segmented_store(LENGTHS)


def make_distiller(student: PreTrainedModel, store: KVStore, mode: Mode | None) -> KVDistiller:
    distiller = KVDistiller(student, [AlignedTeacher(TeacherView(LayerMap.one_hot(LAYER_MAP, 3)))])
    if mode is None:
        return distiller
    config = student.config
    space = KVSpace(config.num_key_value_heads, config.head_dim)
    torch.manual_seed(4)
    aligner = Aligner(AlignerConfig(mode, "student-to-teacher", len(LAYER_MAP), space, TEACHER))
    aligner.normalise_teacher.set_moments(*teacher_moments(distiller, KVDataset(store, with_kv=True), ALL))
    distiller.teacher.aligner = aligner
    return distiller


def reference_tokens(student: PreTrainedModel, store: KVStore) -> tuple[list[list[float]], list[list[bool]]]:
    """Cross-entropy and hit of every learned token, sample by sample, without padding."""
    losses, hits = [], []
    for index, length in enumerate(LENGTHS):
        ids = torch.from_numpy(store.input_ids[index, :length].astype(np.int64))
        log_probabilities = student(ids[None]).logits[0].double().log_softmax(-1).detach()
        learned = [t for t in range(1, length) if store.segment_ids[index, t] > 0]
        losses.append([-log_probabilities[t - 1, ids[t]].item() for t in learned])
        hits.append([int(log_probabilities[t - 1].argmax()) == int(ids[t]) for t in learned])
    return losses, hits


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("mode", ["flat", None])
def test_evaluate_tokens_is_a_loop_over_unpadded_samples(
    stored: Stored, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, mode: Mode | None, batch_size: int
) -> None:
    monkeypatch.setattr(evaluate, "EVAL_BATCH", batch_size)
    store, _ = stored
    student = make_model()
    losses, hits = reference_tokens(student, store)
    metrics, samples = evaluate_tokens(make_distiller(student, store, mode), KVDataset(store, with_kv=True), ALL)
    count = sum(map(len, losses))
    assert metrics["ce"] == pytest.approx(sum(map(sum, losses)) / count, rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(sum(map(sum, hits)) / count)
    assert [sample.tokens for sample in samples] == [len(sample) for sample in losses]
    assert [sample.ce for sample in samples] == pytest.approx([sum(s) / len(s) for s in losses], rel=1e-4)
    assert [sample.token_accuracy for sample in samples] == pytest.approx([sum(s) / len(s) for s in hits])


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_agreement_of_the_caches_is_a_loop_over_unpadded_samples(
    stored: Stored, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, mode: Mode, batch_size: int
) -> None:
    monkeypatch.setattr(evaluate, "EVAL_BATCH", batch_size)
    store, teacher = stored
    distiller = make_distiller(make_model(), store, mode)
    metrics, _ = evaluate_tokens(distiller, KVDataset(store, with_kv=True), ALL)

    predictions, targets, students = [], [], []
    for index, length in enumerate(LENGTHS):
        ids = torch.from_numpy(store.input_ids[index, :length].astype(np.int64))[None]
        _, kv = distiller.student_forward(ids, torch.ones_like(ids))
        prediction, target = distiller.teacher.aligner(kv, teacher[index][list(LAYER_MAP)][:, :, None])
        predictions.append(prediction[:, :, 0].detach().double())
        targets.append(target[:, :, 0].double())
        students.append(kv[:, :, 0].detach())
    prediction, target, student = (torch.cat(parts, dim=3) for parts in (predictions, targets, students))
    whole_teacher = torch.cat(teacher, dim=3)
    for kind, name in enumerate(("key", "value")):
        p, t = prediction[:, kind], target[:, kind]
        cosine = (p * t).sum(-1) / (p.norm(dim=-1) * t.norm(dim=-1))
        assert metrics[f"cosine_{name}"] == pytest.approx(cosine.mean().item(), rel=1e-4)
        assert metrics[f"nmse_{name}"] == pytest.approx((p - t).square().mean().item(), rel=1e-4)
        cka = [
            reference_cka(
                student[layer, kind].transpose(0, 1).flatten(1), whole_teacher[mapped, kind].transpose(0, 1).flatten(1)
            )
            for layer, mapped in enumerate(LAYER_MAP)
        ]
        assert metrics[f"cka_{name}"] == pytest.approx(np.mean(cka), rel=1e-4)


def test_agreement_without_an_aligner_is_cka_alone(stored: Stored, make_model: MakeModel) -> None:
    store, _ = stored
    distiller, dataset = make_distiller(make_model(), store, None), KVDataset(store, with_kv=True)
    metrics, _ = evaluate_tokens(distiller, dataset, ALL)
    assert set(metrics) == {"ce", "token_accuracy", "cka_key", "cka_value"}
    without_kv, _ = evaluate_tokens(distiller, KVDataset(store, with_kv=False), ALL)
    assert without_kv == {name: metrics[name] for name in ("ce", "token_accuracy")}


def test_samples_are_reported_in_the_order_asked_for(stored: Stored, make_model: MakeModel) -> None:
    store, _ = stored
    distiller, dataset = make_distiller(make_model(), store, None), KVDataset(store, with_kv=False)
    _, forward = evaluate_tokens(distiller, dataset, [5, 1, 7])
    _, backward = evaluate_tokens(distiller, dataset, [7, 1, 5])
    assert [s.ce for s in forward] == pytest.approx([s.ce for s in backward[::-1]], rel=1e-5)


@pytest.fixture
def answering(make_model: MakeModel) -> PreTrainedModel:
    """A student that has learned one thing: after any prompt, `#### w7`."""
    model = make_model().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    tail = torch.tensor([3, 7, 1]).expand(16, 3)
    for step in range(40):
        prompt = torch.randint(4, 40, (16, 3), generator=generator)
        ids = torch.cat([prompt, tail], dim=1)
        labels = torch.cat([torch.full_like(prompt, -100), tail], dim=1)
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert step < 39 or model(ids, labels=labels).loss.item() < 0.1
    return model.eval()


def test_exact_match_asks_for_the_very_answer(
    stored: Stored, answering: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = stored
    found = evaluate_answers(answering, tokenizer, store, teachers_tokens(store), ALL, 5)
    # Sample i asks for the answer `w<i>`.
    assert found == {index: ("#### w7", index == 7) for index in ALL}
    records: list[dict[str, Any]] = [
        {**record, "answer": "" if i % 2 else " w7 "} for i, record in enumerate(store.records)
    ]
    monkeypatch.setattr(store, "records", records)
    assert evaluate_answers(answering, tokenizer, store, teachers_tokens(store), [6, 1, 2], 5) == dict.fromkeys(
        (6, 2), ("#### w7", True)
    )


def test_a_teacher_without_a_token_says_nothing(stored: Stored, make_model: MakeModel) -> None:
    store, _ = stored
    nothing = KVDataset(store, with_kv=True, segments=[])
    metrics, _ = evaluate_tokens(make_distiller(make_model(), store, "flat"), nothing, ALL)
    assert set(metrics) == {"ce", "token_accuracy"}
    weights = MeanWeights()
    weights.update(torch.zeros(2, 3, 1, 4))
    assert weights.metrics() == {}
