"""The module that trains: a student, an aligner, and the loss between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kvcache.align.aligner import Aligner
from ..kvcache.align.teacher_view import TeacherView
from ..kvcache.align.time_warp import TimeMap
from ..kvcache.capture import CaptureCache
from ..kvcache.layout import stack_past_kv, take_tokens
from ..kvcache.queries import recorded_queries
from .loss_terms import KVBatch, LossTerm, kv_loss, needs_queries
from .losses import next_token_loss


class KVDistiller(nn.Module):
    """`loss = cross-entropy + kv_weight * KV loss`, from one student forward.

    `view` lays the teacher's KV onto the student's layers and tokens, `aligner` both into one space. Without `terms`
    only the cross-entropy is left: the no-KV control. `progress` is the share of the run that is done, for losses
    that warm up.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        view: TeacherView,
        aligner: Aligner | None = None,
        terms: Sequence[LossTerm] = (),
        kv_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.view = view
        self.aligner = aligner
        self.terms = tuple(terms)
        self.kv_weight = kv_weight
        self.progress = 0.0

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        **teacher: Tensor,
    ) -> dict[str, Tensor]:
        """`loss` and its part `ce`; with teacher KV also `kv` and each of several terms, the `target` that was compared
        with, the `target_mask` `[B, T]` of its real tokens, and `kv_loss`, weighted and with its graph.

        `teacher` is what a `KVDataset` puts into a batch.
        """
        if not self.terms or not teacher:
            ce = next_token_loss(self.student(input_ids, attention_mask=attention_mask, use_cache=False).logits, labels)
            return {"loss": ce, "ce": ce.detach()}
        logits, compared = self.compare({"input_ids": input_ids, "attention_mask": attention_mask, **teacher})
        ce = next_token_loss(logits, labels)
        kv, parts = kv_loss(self.terms, compared, self.progress)
        outputs = {"loss": ce + self.kv_weight * kv, "ce": ce.detach(), "kv": kv.detach()}
        target = compared.target if compared.target is not None else compared.teacher_kv
        watched = {"target": target.detach(), "target_mask": compared.mask, "kv_loss": self.kv_weight * kv}
        return outputs | (parts if len(parts) > 1 else {}) | watched

    def compare(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "B T V"], KVBatch]:
        """The student's logits, and both sides' KV of the compared tokens, raw and aligned."""
        if not needs_queries(self.terms) or "teacher_queries" not in batch:
            logits, student_kv = self.student_side(batch)
            return logits, self._compared(student_kv, batch)
        with recorded_queries(self.student, batch.get("kv_positions")) as queries:
            logits, student_kv = self.student_side(batch)
        compared = self._compared(student_kv, batch)
        own = torch.stack([queries[layer] for layer in sorted(queries)])
        return logits, replace(
            compared, student_queries=own, teacher_queries=self.view.layer_map.apply(batch["teacher_queries"])
        )

    def _compared(self, student_kv: Float[Tensor, "L 2 B H T D"], batch: Mapping[str, Tensor]) -> KVBatch:
        teacher_kv, mask = self.teacher_side(batch)
        prediction, target = self.aligner(student_kv, teacher_kv) if self.aligner is not None else (None, None)
        return KVBatch(prediction, target, student_kv, teacher_kv, mask)

    def student_side(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "L 2 B H K D"]]:
        """The student's logits, and its KV of the tokens that have a counterpart in the store."""
        logits, kv = self.student_forward(batch["input_ids"], batch["attention_mask"])
        kv = self.view.student(kv)
        return logits, take_tokens(kv, batch["kv_positions"]) if "kv_positions" in batch else kv

    def teacher_side(self, batch: Mapping[str, Tensor]) -> tuple[Shaped[Tensor, "L 2 B H T D"], Int[Tensor, "B T"]]:
        """The teacher's KV laid onto the student's layers and tokens, and on which tokens it is compared."""
        time_map = TimeMap(batch["time_index"], batch["time_weight"]) if "time_index" in batch else None
        kv = self.view.teacher(batch["teacher_kv"], batch.get("teacher_positions"), time_map)
        mask = batch.get("kv_mask", batch["attention_mask"])
        if time_map is not None:
            mask = mask * time_map.mask
        if (places := batch.get("kv_positions")) is not None:
            mask = mask.gather(1, places.clamp_min(0)) * (places >= 0)
        return kv, mask

    def student_forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "L 2 B H T D"]]:
        """Logits and the student's own KV, with gradients."""
        cache = CaptureCache(self.student.config)
        output = self.student(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        cache.check_complete()
        return output.logits, stack_past_kv(cache)
