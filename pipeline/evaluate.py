"""How good a student is: on held-out tokens, by the answers it generates, and by its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.sample import Segment, extract_answer
from ..kvcache.align.cka import LinearCKA
from ..kvcache.layout import token_features
from ..kvcache.store import KVStore
from .distiller import KVDistiller
from .fused_dataset import FusedDataset
from .generation import chunks, generate_texts
from .loss_terms import KVBatch
from .losses import IGNORED, kv_mse, next_token_loss
from .student_text import StudentText
from .teacher_batches import STUDENTS
from .teacher_weights import MeanWeights
from .training_data import KVDataset

EVAL_BATCH = 32


@dataclass(frozen=True)
class SampleScore:
    """One held-out sample: how many tokens of it are learned, their mean cross-entropy, and the share of them that the
    student would have said."""

    tokens: int
    ce: float
    token_accuracy: float


class KVAgreement:
    """Collects how far the student's cache agrees with the teacher's, key and value apart.

    `cosine` and `nmse` compare prediction and target of the aligner, so they exist with one only; `cka` compares
    the caches as the view lays them onto each other and needs none.
    """

    def __init__(self) -> None:
        self._cka: list[tuple[LinearCKA, LinearCKA]] = []
        self._tokens = 0.0
        self._sums: dict[str, float] = {}

    def update(self, compared: KVBatch) -> None:
        student, teacher, mask = compared.student_kv, compared.teacher_kv, compared.mask
        if not mask.any():
            return
        self._cka = self._cka or [(LinearCKA(), LinearCKA()) for _ in student]
        for layer, pair in enumerate(self._cka):
            for kv, cka in enumerate(pair):
                cka.update(token_features(student[layer, kv], mask), token_features(teacher[layer, kv], mask))
        if compared.prediction is None or compared.target is None:
            return
        tokens = float(mask.sum())
        for kv, name in enumerate(("key", "value")):
            p, t = compared.prediction[:, kv : kv + 1], compared.target[:, kv : kv + 1]
            cosine = F.cosine_similarity(p, t, dim=-1) * mask[None, None, :, None, :]
            layers, heads = cosine.shape[0], cosine.shape[3]
            self._add(f"cosine_{name}", float(cosine.sum()) / (layers * heads))
            self._add(f"nmse_{name}", float(kv_mse(p, t, mask)) * tokens)
        self._tokens += tokens

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def metrics(self) -> dict[str, float]:
        found = {name: total / max(1.0, self._tokens) for name, total in self._sums.items()}
        for kv, name in enumerate(("key", "value") if self._cka else ()):
            found[f"cka_{name}"] = sum(layer[kv].value() for layer in self._cka) / len(self._cka)
        return found


@torch.inference_mode()
def evaluate_tokens(
    distiller: KVDistiller, dataset: KVDataset | FusedDataset, indices: Sequence[int]
) -> tuple[dict[str, float], list[SampleScore]]:
    """Teacher-forced metrics over held-out samples, and the scores of each sample, in the order given.

    `ce` (nats a token) and `token_accuracy` are over learned tokens; the rest are KVAgreement's, where the
    dataset carries teacher KV. Of several teachers these have the teacher's number behind their names, and there are
    those of MeanWeights.
    """
    distiller.eval()
    device = distiller.student.device
    agreements = [KVAgreement() for _ in distiller.teachers]
    mean_weights = MeanWeights()
    loss = correct = count = 0.0
    samples: dict[int, SampleScore] = {}
    # Texts of one length side by side: less padding to compute.
    order = sorted(indices, key=lambda index: dataset.text.length[index])
    for batch_indices in chunks(order, EVAL_BATCH):
        batch = {name: tensor.to(device) for name, tensor in dataset.__getitems__(batch_indices).items()}
        if batch.keys() - set(STUDENTS):
            logits, compared, weights = distiller.compare(batch)
            for agreement, each in zip(agreements, compared, strict=True):
                agreement.update(each)
            if weights is not None and distiller.terms:
                mean_weights.update(weights)
        else:
            logits, _ = distiller.student_forward(batch["input_ids"], batch["attention_mask"])
        losses = next_token_loss(logits, batch["labels"], reduction="none")
        learned = batch["labels"][:, 1:] != IGNORED
        hits = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]) & learned
        tokens = learned.sum(1)
        scores = (losses.sum(1) / tokens.clamp_min(1), hits.sum(1) / tokens.clamp_min(1))
        rows = map(SampleScore, tokens.tolist(), *(score.tolist() for score in scores))
        samples |= zip(batch_indices, rows, strict=True)
        loss, correct, count = loss + float(losses.sum()), correct + float(hits.sum()), count + float(learned.sum())
    metrics = {"ce": loss / count, "token_accuracy": correct / count}
    for number, agreement in enumerate(agreements):
        ending = f"_{number}" if len(agreements) > 1 else ""
        metrics |= {f"{name}{ending}": value for name, value in agreement.metrics().items()}
    return metrics | mean_weights.metrics(), [samples[index] for index in indices]


def evaluate_answers(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: KVStore,
    text: StudentText,
    indices: Sequence[int],
    max_new_tokens: int,
) -> dict[int, tuple[str, bool]]:
    """For every sample with a prompt and an answer: the generated text, and whether its answer is exact."""
    student.eval()
    chosen, prompts = [], []
    for index in indices:
        ids = text.input_ids[index][text.segment_ids[index] == Segment.PROMPT]
        if len(ids) and store.records[index]["answer"]:
            chosen.append(int(index))
            prompts.append(ids.tolist())
    texts = generate_texts(student, tokenizer, prompts, max_new_tokens)
    return {
        index: (text, extract_answer(text) == store.records[index]["answer"].strip())
        for index, text in zip(chosen, texts, strict=True)
    }
