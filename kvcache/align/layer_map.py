"""Which teacher layer a student layer learns from."""

from __future__ import annotations


def ratio_map(num_student_layers: int, num_teacher_layers: int) -> tuple[int, ...]:
    """Teacher layer for every student layer, at the same relative depth; the last learns from the last."""
    return tuple(
        max(0, round((layer + 1) * num_teacher_layers / num_student_layers) - 1) for layer in range(num_student_layers)
    )
