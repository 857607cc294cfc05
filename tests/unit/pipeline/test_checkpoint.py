"""Training state that comes back to the bit, as data alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kvpipe.pipeline.checkpoint import load_optimizer, load_rng, save_optimizer, save_rng
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

MakeOptimizer = Callable[[list[dict[str, object]]], Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adam": lambda groups: Adam(groups, lr=1e-2),
    "adamw-amsgrad": lambda groups: AdamW(groups, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "sgd-momentum": lambda groups: SGD(groups, lr=1e-2, momentum=0.9),
}


class Training:
    """A small net with dropout, two parameter groups, and noise from all three generators."""

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
        body, head = self.net[0], self.net[3]
        groups = [{"params": list(body.parameters())}, {"params": list(head.parameters()), "lr": 5e-2}]
        self.optimizer = make_optimizer(groups)
        self.scheduler: LRScheduler = get_cosine_schedule_with_warmup(self.optimizer, 3, 20)

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            batch = torch.randn(4, 6) * random.random() + torch.from_numpy(np.random.rand(4, 6)).float()
            loss = self.net(batch).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.net.parameters()]


@pytest.fixture(autouse=True)
def generators() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_resumed_training_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    training = Training(OPTIMIZERS[name])
    training.run(5)
    save_optimizer(training.optimizer, training.scheduler, tmp_path)
    save_rng(tmp_path / "rng.json")
    weights = training.weights()
    losses = training.run(7)

    resumed = Training(OPTIMIZERS[name])
    resumed.run(2)
    with torch.no_grad():
        for parameter, saved in zip(resumed.net.parameters(), weights, strict=True):
            parameter.copy_(saved)
    load_optimizer(resumed.optimizer, resumed.scheduler, tmp_path)
    load_rng(tmp_path / "rng.json")
    assert resumed.run(7) == losses
    for found, expected in zip(resumed.weights(), training.weights(), strict=True):
        assert torch.equal(found, expected)
    assert resumed.scheduler.get_last_lr() == training.scheduler.get_last_lr()
    assert resumed.scheduler.get_last_lr()[1] == pytest.approx(5 * resumed.scheduler.get_last_lr()[0])


def test_without_the_optimizers_state_the_training_goes_another_way(tmp_path: Path) -> None:
    training = Training(OPTIMIZERS["adam"])
    training.run(5)
    save_rng(tmp_path / "rng.json")
    weights = training.weights()
    losses = training.run(7)
    fresh = Training(OPTIMIZERS["adam"])
    with torch.no_grad():
        for parameter, saved in zip(fresh.net.parameters(), weights, strict=True):
            parameter.copy_(saved)
    load_rng(tmp_path / "rng.json")
    assert fresh.run(7) != losses


def test_an_optimizer_that_has_not_stepped_comes_back_empty(tmp_path: Path) -> None:
    training = Training(OPTIMIZERS["adam"])
    save_optimizer(training.optimizer, training.scheduler, tmp_path)
    load_optimizer(training.optimizer, training.scheduler, tmp_path)
    assert not training.optimizer.state_dict()["state"]


def test_every_generator_comes_back(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, list[float]]:
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(3).tolist()

    draw()  # leaves the second of a pair of normal numbers behind
    save_rng(tmp_path / "rng.json")
    expected = draw()
    draw()
    load_rng(tmp_path / "rng.json")
    assert draw() == expected


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path: Path) -> None:
    training = Training(OPTIMIZERS["adam"])
    training.run(2)
    save_optimizer(training.optimizer, training.scheduler, tmp_path)
    save_rng(tmp_path / "rng.json")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]
