"""Watch the distillation target: a target that shrinks lowers the loss and teaches nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..kvcache.errors import CollapseError

COLLAPSE_RATIO = 0.1
"""A run has collapsed when its target keeps less than this share of the variance it started with."""


@dataclass(frozen=True)
class TargetHealth:
    """Variance over tokens, averaged over channels, and effective rank, averaged over layers, key and value."""

    variance: float
    effective_rank: float


def target_health(target: Float[Tensor, "L 2 B H T D"], mask: Int[Tensor, "B T"]) -> TargetHealth:
    """Health of one batch's target over its real tokens."""
    tokens = target.permute(0, 1, 2, 4, 3, 5).flatten(4)[:, :, mask.bool()].flatten(0, 1).float()
    centred = tokens - tokens.mean(1, keepdim=True)
    return TargetHealth(
        variance=float(centred.square().mean()),
        effective_rank=sum(effective_rank(features) for features in centred) / len(centred),
    )


def effective_rank(centred: Float[Tensor, "N F"]) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli, 2007): from 1 to min(N, F)."""
    # Through the Gram matrix: a decomposition of [F, F], however many tokens.
    singular = torch.linalg.eigvalsh(centred.double().T @ centred.double()).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


class CollapseMonitor:
    """Compares the target's variance with what it was at the start of the run."""

    def __init__(self) -> None:
        self.initial: TargetHealth | None = None
        self.latest: TargetHealth | None = None

    @property
    def collapsed(self) -> bool:
        if self.initial is None or self.latest is None:
            return False
        return self.latest.variance < COLLAPSE_RATIO * self.initial.variance

    def update(self, target: Float[Tensor, "L 2 B H T D"], mask: Int[Tensor, "B T"]) -> TargetHealth:
        self.latest = target_health(target, mask)
        self.initial = self.initial or self.latest
        return self.latest

    def save(self, folder: Path) -> None:
        """Write `monitor.json`: a resumed run is still held against its start."""
        health = [asdict(health) if health is not None else None for health in (self.initial, self.latest)]
        (folder / "monitor.json").write_text(json.dumps(health))

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote."""
        health = json.loads((folder / "monitor.json").read_text())
        self.initial, self.latest = (TargetHealth(**found) if found is not None else None for found in health)

    def error(self) -> CollapseError:
        """What happened, for the user. Only after `collapsed`."""
        assert self.initial is not None
        assert self.latest is not None
        return CollapseError(
            "the distillation target collapsed: the KV loss falls because the target shrinks",
            expected=f"at least {COLLAPSE_RATIO:.0%} of its initial variance {self.initial.variance:.3g}",
            found=f"{self.latest.variance:.3g} (effective rank {self.latest.effective_rank:.1f}, "
            f"at first {self.initial.effective_rank:.1f})",
            remedy="Use the default --direction student-to-teacher, whose target is fixed, or --on-collapse warn",
        )
