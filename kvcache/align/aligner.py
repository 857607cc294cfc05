"""Bring student and teacher KV into one space, where a loss can compare them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from jaxtyping import Float, Shaped
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError
from .closed_form import ClosedForm
from .head_projection import (
    BottleneckProjection,
    FlatProjection,
    KVSpace,
    LinearProjection,
    Start,
    StructuredProjection,
)
from .normalisation import Normalisation

Mode = Literal["structured", "flat", "flat-global", "bottleneck", "identity"]
Direction = Literal["student-to-teacher", "teacher-to-student-frozen", "teacher-to-student-joint"]


@dataclass(frozen=True)
class AlignerConfig:
    """All that an aligner is, but its weights: saved as `aligner.json`.

    `size` is the number of terms of a structured projection, the rank of a flat one (None: full), the width of a
    bottleneck. `share_layers`, which `flat-global` implies, gives all layers one projection. `closed_form` is how
    it was fitted before training, if it was.
    """

    mode: Mode
    direction: Direction
    num_layers: int
    student: KVSpace
    teacher: KVSpace
    share_dim_proj: bool = True
    share_layers: bool = False
    start: Start = "random"
    size: int | None = None
    closed_form: ClosedForm | None = None


class Aligner(nn.Module):
    """The head projection between two KVs of the same layers and tokens. The teacher's is normalised first.

    `student-to-teacher` projects the student onto the teacher's KV: the target is data and cannot move.
    `teacher-to-student-frozen` projects the teacher onto the student's KV by a map that was fitted beforehand and
    stays; the student's is normalised too, by its moments at that time, or its largest channels were all that counts.
    `teacher-to-student-joint` trains that projection with the student: both sides may shrink together, which
    lowers the loss and teaches nothing. It is here to show that, under the collapse monitor.
    """

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.config = config
        self.projection = _projection(config)
        self.normalise_teacher = Normalisation(config.num_layers, config.teacher)
        self.normalise_student: Normalisation | nn.Identity = nn.Identity()
        if config.direction == "teacher-to-student-frozen":
            self.projection.requires_grad_(False)
            self.normalise_student = Normalisation(config.num_layers, config.student)

    @property
    def target_moves(self) -> bool:
        """Whether training can change what the student is compared with."""
        return self.config.direction == "teacher-to-student-joint"

    def forward(
        self, student_kv: Float[Tensor, "L 2 B Hs T Ds"], teacher_kv: Shaped[Tensor, "L 2 B Ht T Dt"]
    ) -> tuple[Float[Tensor, "L 2 B H T D"], Float[Tensor, "L 2 B H T D"]]:
        """(prediction, target), both in the space of the projection's output."""
        teacher = self.normalise_teacher(teacher_kv)
        if self.config.mode == "identity":
            return self.normalise_teacher(student_kv), teacher
        student = self.normalise_student(student_kv)
        if self.config.direction == "student-to-teacher":
            return self.projection(student), teacher
        return student, self.projection(teacher)

    def save(self, folder: Path) -> None:
        """Write `aligner.safetensors` and `aligner.json`."""
        save_file(self.state_dict(), folder / "aligner.safetensors")
        (folder / "aligner.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Aligner:
        """The aligner that `save` wrote into `folder`."""
        document = json.loads((folder / "aligner.json").read_text())
        sides = {side: KVSpace(**document[side]) for side in ("student", "teacher")}
        aligner = cls(AlignerConfig(**{**document, **sides}))
        aligner.load_state_dict(load_file(folder / "aligner.safetensors"))
        return aligner


def _projection(config: AlignerConfig) -> LinearProjection | BottleneckProjection | nn.Identity:
    source, target = config.student, config.teacher
    if config.direction != "student-to-teacher":
        source, target = target, source
    shared = config.share_layers or config.mode == "flat-global"
    layers = 1 if shared else config.num_layers
    if config.mode == "identity":
        return _identity(source, target)
    if config.mode == "bottleneck":
        return BottleneckProjection(layers, source, target, config.size or 1)
    if config.mode == "structured":
        return StructuredProjection(
            layers,
            source,
            target,
            share_dim_proj=config.share_dim_proj,
            terms=config.size or 1,
            start=config.start,
        )
    return FlatProjection(layers, source, target, config.size)


def _identity(source: KVSpace, target: KVSpace) -> nn.Identity:
    if source != target:
        raise ConfigError(
            "student and teacher differ in shape, so --mode identity cannot compare them channel by channel",
            expected=f"{target.num_kv_heads} KV heads of {target.head_dim} channels",
            found=f"{source.num_kv_heads} of {source.head_dim}",
            remedy="Choose --mode structured or flat, or --kv-loss relation, which fits any shapes",
        )
    return nn.Identity()
