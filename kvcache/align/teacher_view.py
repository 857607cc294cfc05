"""The teacher's KV as a student is to see it: its layers mapped, its tokens laid onto the student's, and its keys
rotated as those they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..rope import RoPE
from .layer_map import LayerMap
from .time_warp import TimeMap

KeySpace = Literal["post-rope", "pre-rope"]


@dataclass(frozen=True)
class TeacherView:
    """Layer map, then time map. `teacher_rope` and `student_rope` are None for models without rotary embedding.

    Keys of different tokens are mixed without their rotation only: averaging what was rotated by different angles
    loses them. In the key space `post-rope` they are rotated again, to the student's positions; in `pre-rope`
    keys are compared without any rotation, on both sides.
    """

    layer_map: LayerMap
    key_space: KeySpace = "post-rope"
    teacher_rope: RoPE | None = None
    student_rope: RoPE | None = None

    def teacher(
        self,
        kv: Shaped[Tensor, "Lt 2 B H K D"],
        positions: Int[Tensor, "B K"] | None = None,
        time_map: TimeMap | None = None,
    ) -> Shaped[Tensor, "Ls 2 B H T D"]:
        """Of every student layer and token. `positions` are those at which the teacher's keys were rotated, by default
        one after the other; without a time map every token stays where it is."""
        mapped = self.layer_map.apply(kv)
        if time_map is None and (self.key_space == "post-rope" or self.teacher_rope is None):
            return mapped
        unrotated = _without_rotation(mapped, self.teacher_rope, positions)
        if time_map is None:
            return unrotated
        warped = time_map.warp(unrotated)
        if self.key_space == "pre-rope" or self.teacher_rope is None:
            return warped
        return _with_keys(warped, self.teacher_rope.apply(warped[:, 0], _in_order(warped)))

    def student(self, kv: Float[Tensor, "L 2 B H T D"]) -> Float[Tensor, "L 2 B H T D"]:
        """The student's own KV, in the key space of the comparison."""
        return kv if self.key_space == "post-rope" else _without_rotation(kv, self.student_rope, None)


def _without_rotation(
    kv: Shaped[Tensor, "L 2 B H T D"], rope: RoPE | None, positions: Int[Tensor, "B T"] | None
) -> Shaped[Tensor, "L 2 B H T D"]:
    if rope is None:
        return kv
    return _with_keys(kv, rope.remove(kv[:, 0], _in_order(kv) if positions is None else positions))


def _with_keys(kv: Shaped[Tensor, "L 2 B H T D"], keys: Float[Tensor, "L B H T D"]) -> Float[Tensor, "L 2 B H T D"]:
    return torch.stack([keys, kv[:, 1].to(keys.dtype)], dim=1)


def _in_order(kv: Shaped[Tensor, "L 2 B H T D"]) -> Int[Tensor, "B T"]:
    return torch.arange(kv.shape[4], device=kv.device).expand(kv.shape[2], -1)
