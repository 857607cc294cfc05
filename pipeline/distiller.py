"""The module that trains: a student, its teachers as they are aligned with it, and the loss between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kvcache.align.fusion import Fusion, LearnedFusion, SimilarityFusion, entropy
from ..kvcache.capture import CaptureCache
from ..kvcache.layout import stack_past_kv
from ..kvcache.queries import recorded_queries
from .aligned_teacher import AlignedTeacher
from .fused_kv import fused
from .loss_terms import KVBatch, LossTerm, kv_loss, needs_queries
from .losses import next_token_loss
from .teacher_batches import of_teacher


class KVDistiller(nn.Module):
    """`loss = cross-entropy + kv_weight * KV loss`, from one student forward.

    Of several `teachers`, `fusion` says how much each counts; `router_entropy` times the entropy of these weights is
    taken off the loss. Without `terms` only the cross-entropy is left: the no-KV control. `progress` is the share of
    the run that is done, for losses that warm up.
    """

    teachers: Sequence[AlignedTeacher]

    def __init__(
        self,
        student: PreTrainedModel,
        teachers: Sequence[AlignedTeacher],
        terms: Sequence[LossTerm] = (),
        kv_weight: float = 1.0,
        fusion: Fusion | None = None,
        router_entropy: float = 0.0,
    ) -> None:
        super().__init__()
        assert (fusion is not None) == (len(teachers) > 1)
        self.student = student
        # A module of modules, known by what is in it.
        self.teachers = nn.ModuleList(teachers)  # type: ignore[assignment]
        self.terms = tuple(terms)
        self.kv_weight = kv_weight
        self.fusion = fusion
        self.router_entropy = router_entropy
        self.progress = 0.0

    @property
    def teacher(self) -> AlignedTeacher:
        """The only one."""
        (teacher,) = self.teachers
        return teacher

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        **teacher_batch: Tensor,
    ) -> dict[str, Tensor]:
        """`loss` and its part `ce`; with teacher KV also `kv` and each of several terms, of several teachers each one's
        mean `fusion_weight_<number>`, the `target` that was compared with, the `target_mask` `[B, T]` of its real
        tokens, and `kv_loss`, weighted and with its graph.

        `teacher_batch` is what a `KVDataset` puts into a batch, of several a `FusedDataset`.
        """
        if not self.terms or not teacher_batch:
            ce = next_token_loss(self.student(input_ids, attention_mask=attention_mask, use_cache=False).logits, labels)
            return {"loss": ce, "ce": ce.detach()}
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, **teacher_batch}
        logits, compared, weights = self.compare(batch)
        ce = next_token_loss(logits, labels)
        if weights is not None:
            compared = fused(compared, weights, in_one_space=self.fuses_targets)
        kv, parts = self._kv_loss(compared)
        outputs = {"loss": ce + self.kv_weight * kv, "ce": ce.detach(), "kv": kv.detach()}
        outputs |= parts if len(parts) > 1 else {}
        if weights is not None:
            outputs["loss"] = outputs["loss"] - self.router_entropy * entropy(weights)
            total = weights.detach().sum().clamp_min(1)
            outputs |= {f"fusion_weight_{k}": own.sum() / total for k, own in enumerate(weights.detach())}
        target = compared[0].target if compared[0].target is not None else compared[0].teacher_kv
        watched = {"target": target.detach(), "target_mask": compared[0].mask, "kv_loss": self.kv_weight * kv}
        return outputs | watched

    def _kv_loss(self, compared: Sequence[KVBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Over all batches: the weighted sum of the terms, and each of them alone."""
        first, *others = [kv_loss(self.terms, batch, self.progress) for batch in compared]
        total, parts = first
        for kv, its_parts in others:
            total, parts = total + kv, {name: parts[name] + its_parts[name] for name in parts}
        return total, parts

    def compare(
        self, batch: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "B T V"], list[KVBatch], Float[Tensor, "K L B T"] | None]:
        """The student's logits, both sides' KV of each teacher's compared tokens, raw and aligned, and the weights of
        several teachers."""
        if self.fusion is None:
            logits, compared = self._compare_with_one(batch)
            return logits, [compared], None
        logits, student_kv = self.student_forward(batch["input_ids"], batch["attention_mask"])
        found = [t.compare(student_kv, of_teacher(batch, number)) for number, t in enumerate(self.teachers)]
        # Without terms nothing was aligned, and the weights are fixed.
        predictions = [each.prediction if each.prediction is not None else each.student_kv for each in found]
        return logits, found, self.fusion(student_kv, predictions, torch.stack([each.mask for each in found]))

    def _compare_with_one(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "B T V"], KVBatch]:
        if not needs_queries(self.terms) or "teacher_queries" not in batch:
            logits, student_kv = self.student_forward(batch["input_ids"], batch["attention_mask"])
            return logits, self.teacher.compare(student_kv, batch)
        with recorded_queries(self.student, batch.get("kv_positions")) as queries:
            logits, student_kv = self.student_forward(batch["input_ids"], batch["attention_mask"])
        compared = self.teacher.compare(student_kv, batch)
        own = torch.stack([queries[layer] for layer in sorted(queries)])
        teachers = self.teacher.view.layer_map.apply(batch["teacher_queries"])
        return logits, replace(compared, student_queries=own, teacher_queries=teachers)

    @property
    def fuses_targets(self) -> bool:
        """Whether all teachers' targets lie in one space, the student's, where they can be averaged."""
        aligners = [teacher.aligner for teacher in self.teachers]
        return all(a is not None and a.config.direction != "student-to-teacher" for a in aligners)

    @property
    def projects(self) -> bool:
        """Whether KV is compared through an aligner."""
        return any(teacher.aligner is not None for teacher in self.teachers)

    @property
    def target_moves(self) -> bool:
        """Whether training can change what the student is compared with."""
        moving = any(t.aligner is not None and t.aligner.target_moves for t in self.teachers)
        routed = isinstance(self.fusion, SimilarityFusion | LearnedFusion)
        return moving or (routed and self.fuses_targets)

    def student_forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "L 2 B H T D"]]:
        """Logits and the student's own KV, with gradients."""
        cache = CaptureCache(self.student.config)
        output = self.student(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        cache.check_complete()
        return output.logits, stack_past_kv(cache)
