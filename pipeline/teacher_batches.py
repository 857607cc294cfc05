"""A batch for several teachers: what is not the student's has its teacher's number behind its name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

STUDENTS = ("input_ids", "attention_mask", "labels")


def for_teacher(number: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A teacher's side of a batch, as its part of one for several."""
    return {f"{name}.{number}": tensor for name, tensor in batch.items()}


def of_teacher(batch: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The batch as that teacher's own dataset would make it."""
    ending = f".{number}"
    own = {name.removesuffix(ending): tensor for name, tensor in batch.items() if name.endswith(ending)}
    return {name: batch[name] for name in STUDENTS if name in batch} | own
