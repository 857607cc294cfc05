"""What an experiment can ask: how one arm compares with another, and by which measure."""

from __future__ import annotations

from dataclasses import dataclass

COMPARED_METRICS = ("ce", "ce_auc", "exact_match", "token_accuracy")
"""What every comparison is made on; an experiment declares one of them as primary."""

LOWER_IS_BETTER = {"ce", "ce_auc"}


@dataclass(frozen=True)
class Question:
    """Whether `arm` differs from `control`; with a `margin`, whether they differ by less than that on the primary
    metric."""

    arm: str
    control: str
    margin: float | None = None
