"""Bring student and teacher KV into one space, where a loss can compare them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .head_projection import FlatProjection, KVSpace, StructuredProjection

Mode = Literal["structured", "flat"]
Direction = Literal["student-to-teacher", "teacher-to-student-joint"]


@dataclass(frozen=True)
class AlignerConfig:
    """All that an aligner is, but its weights: saved as `aligner.json`."""

    mode: Mode
    direction: Direction
    layer_map: tuple[int, ...]
    student: KVSpace
    teacher: KVSpace
    share_dim_proj: bool = True
    init_uniform: bool = False


class Aligner(nn.Module):
    """Layer map, then head projection. Teacher KV is normalised first, per (layer, head, channel).

    `student-to-teacher` projects the student onto the teacher's KV: the target is data and cannot move.
    `teacher-to-student-joint` projects the teacher onto the student's KV and trains that projection with the
    student: both sides may shrink together, which lowers the loss and teaches nothing. It is here to show
    that, under the collapse monitor.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.config = config
        num_layers = len(config.layer_map)
        source, target = config.student, config.teacher
        if config.direction == "teacher-to-student-joint":
            source, target = target, source
        self.projection: nn.Module
        if config.mode == "flat":
            self.projection = FlatProjection(num_layers, source, target)
        else:
            self.projection = StructuredProjection(
                num_layers, source, target, share_dim_proj=config.share_dim_proj, init_uniform=config.init_uniform
            )
        moments = (num_layers, 2, 1, config.teacher.num_kv_heads, 1, config.teacher.head_dim)
        self.register_buffer("mean", torch.zeros(moments))
        self.register_buffer("std", torch.ones(moments))

    def set_normalisation(self, mean: Float[Tensor, "Lt 2 1 H 1 D"], std: Float[Tensor, "Lt 2 1 H 1 D"]) -> None:
        """Take the teacher's moments, given for all its layers."""
        layers = list(self.config.layer_map)
        self.mean.copy_(mean[layers])
        # A channel that never varies carries nothing: it is centred, not blown up.
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std))[layers])

    def forward(
        self, student_kv: Float[Tensor, "Ls 2 B Hs T Ds"], teacher_kv: Shaped[Tensor, "Lt 2 B Ht T Dt"]
    ) -> tuple[Float[Tensor, "Ls 2 B H T D"], Float[Tensor, "Ls 2 B H T D"]]:
        """(prediction, target), both in the space of the projection's output."""
        selected = teacher_kv[list(self.config.layer_map)].float()
        normalised = (selected - self.mean) / self.std
        if self.config.direction == "student-to-teacher":
            return self.projection(student_kv), normalised
        return student_kv, self.projection(normalised)

    def save(self, folder: Path) -> None:
        """Write `aligner.safetensors` and `aligner.json`."""
        save_file(self.state_dict(), folder / "aligner.safetensors")
        (folder / "aligner.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Aligner:
        """The aligner that `save` wrote into `folder`."""
        document = json.loads((folder / "aligner.json").read_text())
        sides = {side: KVSpace(**document[side]) for side in ("student", "teacher")}
        aligner = cls(AlignerConfig(**{**document, **sides, "layer_map": tuple(document["layer_map"])}))
        aligner.load_state_dict(load_file(folder / "aligner.safetensors"))
        return aligner
