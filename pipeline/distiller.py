"""The module that trains: a student, an aligner, and the loss between them."""

from __future__ import annotations

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kvcache.align.aligner import Aligner
from ..kvcache.capture import CaptureCache
from ..kvcache.layout import stack_past_kv, take_tokens
from .losses import kv_mse, next_token_loss


def at_positions(
    kv: Float[Tensor, "L 2 B H T D"], mask: Int[Tensor, "B T"], positions: Int[Tensor, "B K"] | None
) -> tuple[Float[Tensor, "L 2 B H K D"], Int[Tensor, "B K"]]:
    """The student's KV of the tokens whose teacher KV was kept, and which of them are real; all where none was
    evicted."""
    return (kv, mask) if positions is None else (take_tokens(kv, positions), (positions >= 0).long())


class KVDistiller(nn.Module):
    """`loss = cross-entropy + kv_weight * KV loss`, from one student forward.

    Without an aligner only the cross-entropy is left: the no-KV control.
    """

    def __init__(self, student: PreTrainedModel, aligner: Aligner | None, kv_weight: float = 1.0) -> None:
        super().__init__()
        self.student = student
        self.aligner = aligner
        self.kv_weight = kv_weight

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        teacher_kv: Shaped[Tensor, "L 2 B H K D"] | None = None,
        kv_positions: Int[Tensor, "B K"] | None = None,
    ) -> dict[str, Tensor]:
        """`loss`, its parts `ce` and `kv`, and, where there is teacher KV, the `target` it was compared with and the
        `target_mask` `[B, K]` of its real tokens."""
        if self.aligner is None or teacher_kv is None:
            ce = next_token_loss(self.student(input_ids, attention_mask=attention_mask, use_cache=False).logits, labels)
            return {"loss": ce, "ce": ce.detach()}
        logits, student_kv = self.student_forward(input_ids, attention_mask)
        ce = next_token_loss(logits, labels)
        student_kv, mask = at_positions(student_kv, attention_mask, kv_positions)
        prediction, target = self.aligner(student_kv, teacher_kv)
        kv = kv_mse(prediction, target, mask)
        return {
            "loss": ce + self.kv_weight * kv,
            "ce": ce.detach(),
            "kv": kv.detach(),
            "target": target.detach(),
            "target_mask": mask,
        }

    def student_forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "L 2 B H T D"]]:
        """Logits and the student's own KV, with gradients."""
        cache = CaptureCache(self.student.config)
        output = self.student(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        cache.check_complete()
        return output.logits, stack_past_kv(cache)
