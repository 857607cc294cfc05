"""One teacher as a student learns from it: its KV and the student's, of the same layers and tokens, in one space."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ..kvcache.align.aligner import Aligner
from ..kvcache.align.teacher_view import TeacherView
from ..kvcache.align.time_warp import TimeMap
from ..kvcache.layout import take_tokens
from .loss_terms import KVBatch


class AlignedTeacher(nn.Module):
    """`view` lays the teacher's KV onto the student's layers and tokens, `aligner` both into one space.

    A `batch` is what a `KVDataset` of this teacher's store makes.
    """

    def __init__(self, view: TeacherView, aligner: Aligner | None = None) -> None:
        super().__init__()
        self.view = view
        self.aligner = aligner

    def compare(self, student_kv: Float[Tensor, "L 2 B H T D"], batch: Mapping[str, Tensor]) -> KVBatch:
        """Both sides' KV of the compared tokens, raw and aligned, of a student's KV as it is."""
        student, (teacher, mask) = self.student_side(student_kv, batch), self.teacher_side(batch)
        prediction, target = self.aligner(student, teacher) if self.aligner is not None else (None, None)
        return KVBatch(prediction, target, student, teacher, mask)

    def student_side(
        self, student_kv: Float[Tensor, "L 2 B H T D"], batch: Mapping[str, Tensor]
    ) -> Float[Tensor, "L 2 B H K D"]:
        """The student's KV of the tokens that have a counterpart in the store."""
        kv = self.view.student(student_kv)
        return take_tokens(kv, batch["kv_positions"]) if "kv_positions" in batch else kv

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
