"""The KV losses by the names that users give them, each with a weight and a warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..kvcache.errors import ConfigError
from .kv_losses import (
    attention_weights,
    kv_cka,
    kv_cosine,
    kv_hybrid,
    kv_kava,
    kv_magnitude,
    kv_relation,
    kv_smooth_l1,
    kv_structural,
)
from .losses import kv_mse


@dataclass(frozen=True)
class KVBatch:
    """Both sides' KV of the tokens that are compared. `prediction` and `target` lie in one space, where there is an
    aligner; the others are as the models have them, the teacher's laid onto the student's layers and tokens. Of several
    teachers, `weights` say how much this one counts."""

    prediction: Float[Tensor, "L 2 B H T D"] | None
    target: Float[Tensor, "L 2 B H T D"] | None
    student_kv: Float[Tensor, "L 2 B Hs T Ds"]
    teacher_kv: Shaped[Tensor, "L 2 B Ht T Dt"]
    mask: Int[Tensor, "B T"]
    student_queries: Float[Tensor, "L B Qs T Ds"] | None = None
    teacher_queries: Shaped[Tensor, "L B Qt T Dt"] | None = None
    weights: Float[Tensor, "L B T"] | None = None

    @property
    def aligned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prediction, target and mask."""
        assert self.prediction is not None
        assert self.target is not None
        return self.prediction, self.target, self.mask

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's."""
        assert self.student_queries is not None
        assert self.teacher_queries is not None
        return self.student_queries, self.teacher_queries


def _structural(batch: KVBatch) -> Tensor:
    prediction, target, mask = batch.aligned
    student, teacher = batch.queries
    return kv_structural(prediction, target, teacher, batch.teacher_kv[:, 0], student, batch.student_kv[:, 0], mask)


def _attention_mse(batch: KVBatch) -> Tensor:
    """Errors count as much as the teacher attends to their tokens."""
    _, teacher = batch.queries
    return kv_mse(*batch.aligned, attention_weights(teacher, batch.teacher_kv[:, 0], batch.mask))


def _pointwise(loss: Callable[..., Tensor]) -> Callable[[KVBatch], Tensor]:
    return lambda batch: loss(*batch.aligned, batch.weights)


POINTWISE = {
    "mse": _pointwise(kv_mse),
    "smooth-l1": _pointwise(kv_smooth_l1),
    "mercator": _pointwise(kv_cosine),
    "magnitude": _pointwise(kv_magnitude),
    "hybrid": _pointwise(kv_hybrid),
    "kava": _pointwise(kv_kava),
}
"""Those that are a mean over tokens, on which several teachers can have weights."""

ALIGNED: dict[str, Callable[[KVBatch], Tensor]] = {
    **POINTWISE,
    "structural": _structural,
    "attention-mse": _attention_mse,
}
"""Those that compare the sides in one space."""

RAW: dict[str, Callable[[KVBatch], Tensor]] = {
    "relation": lambda batch: kv_relation(batch.student_kv, batch.teacher_kv, batch.mask),
    "cka": lambda batch: kv_cka(batch.student_kv, batch.teacher_kv, batch.mask),
}
"""Those that compare what each side has of its own, whatever its shape."""

WITH_QUERIES = {"structural", "attention-mse"}
"""Those that look at attention as well."""


@dataclass(frozen=True)
class LossTerm:
    """A loss, its weight, and the first share of the run over which the weight grows from 0."""

    name: str
    weight: float = 1.0
    warmup: float = 0.0

    def weight_at(self, progress: float) -> float:
        """The weight when so much of the run, from 0 to 1, is done."""
        return self.weight * (min(1.0, progress / self.warmup) if self.warmup else 1.0)


def parse_kv_loss(text: str) -> tuple[LossTerm, ...]:
    """`mse`, or `mse,cka:0.1:0.2`: terms with a weight and a warm-up each. Raises ConfigError for anything else."""
    terms = tuple(_parse_term(term) for term in text.split(","))
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise _refuse("every term once", text)
    if not any(term.weight for term in terms):
        raise _refuse("a term with a weight above 0", text)
    return terms


def _parse_term(text: str) -> LossTerm:
    name, *numbers = (part.strip() for part in text.split(":"))
    if name not in ALIGNED | RAW:
        raise _refuse(f"some of {', '.join(ALIGNED | RAW)}", name)
    try:
        weight, warmup = [*map(float, numbers), *(1.0, 0.0)[len(numbers) :]]
    except ValueError as error:
        raise _refuse("name, name:weight or name:weight:warm-up", text) from error
    if not (math.isfinite(weight) and weight >= 0):
        raise _refuse("a weight of 0 or more", text)
    if not 0 <= warmup <= 1:
        raise _refuse("a warm-up from 0 to 1, the share of the run", text)
    return LossTerm(name, weight, warmup)


def _refuse(expected: str, found: str) -> ConfigError:
    # Quoted, so that a line break stays within the line.
    return ConfigError("no such KV loss", expected=expected, found=repr(found), remedy="Mend kv_loss (--kv-loss)")


def needs_aligner(terms: Sequence[LossTerm]) -> bool:
    """Whether any term compares the sides in one space, as `KVBatch.aligned`."""
    return any(term.name in ALIGNED for term in terms)


def weighs_tokens(terms: Sequence[LossTerm]) -> bool:
    """Whether all terms are means over tokens, which `KVBatch.weights` can weigh."""
    return all(term.name in POINTWISE for term in terms)


def needs_queries(terms: Sequence[LossTerm]) -> bool:
    """Whether any term compares attention, and so needs `KVBatch.queries`."""
    return any(term.name in WITH_QUERIES for term in terms)


def kv_loss(
    terms: Sequence[LossTerm], batch: KVBatch, progress: float
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The weighted sum of the terms, and each of them alone, without weight or graph."""
    values = {term.name: (ALIGNED | RAW)[term.name](batch) for term in terms}
    total = sum(term.weight_at(progress) * values[term.name] for term in terms)
    assert isinstance(total, Tensor)
    return total, {name: value.detach() for name, value in values.items()}
