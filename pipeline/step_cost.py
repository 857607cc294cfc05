"""What a training step takes, measured on a few."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import median

import torch

from .distiller import KVDistiller
from .training_data import KVDataset

STEPS = 5
"""Timed, after one that warms up memory, kernels and threads."""

BATCH_SIZE = 8


@dataclass(frozen=True)
class StepCost:
    """`seconds` of a step in the median: reading its batch, forward, backward, AdamW; no logging, no loop around it.
    `parameters` are those that train. `state_bytes` holds the model's and the aligner's weights, their gradients and
    AdamW's moments after the steps; activations come on top."""

    batch_size: int
    seconds: float
    parameters: int
    state_bytes: int


def measure_steps(
    distiller: KVDistiller, dataset: KVDataset, indices: Sequence[int], done: Callable[[], None]
) -> StepCost:
    """Train a copy for a few steps of at most BATCH_SIZE samples, the next ones each time; `done` is called after every
    step."""
    trained = deepcopy(distiller).train()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    size, seconds = min(BATCH_SIZE, len(indices)), []
    for step in range(STEPS + 1):
        batch = [int(indices[(step * size + place) % len(indices)]) for place in range(size)]
        seconds.append(_step(trained, dataset, batch, optimizer))
        done()
    held = [*trained.parameters(), *(parameter.grad for parameter in parameters if parameter.grad is not None)]
    moments = [part for state in optimizer.state.values() for part in state.values() if torch.is_tensor(part)]
    return StepCost(
        batch_size=size,
        seconds=median(seconds[1:]),
        parameters=sum(parameter.numel() for parameter in parameters),
        state_bytes=sum(tensor.nbytes for tensor in (*held, *moments)),
    )


def _step(
    distiller: KVDistiller, dataset: KVDataset, indices: Sequence[int], optimizer: torch.optim.Optimizer
) -> float:
    device = distiller.student.device
    start = time.perf_counter()
    batch = {name: tensor.to(device) for name, tensor in dataset.__getitems__(indices).items()}
    optimizer.zero_grad()
    distiller(**batch)["loss"].backward()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
