"""Watch the distillation target: a target that shrinks lowers the loss and teaches nothing."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..kvcache.errors import CollapseError
from ..kvcache.layout import token_features

COLLAPSE_RATIO = 0.1
"""A run has collapsed when its target keeps less than this share of the variance, or of the effective rank, that it
started with."""

ABSORBED_SHARE = 0.01
"""The aligner has absorbed the KV loss when less than this share of the student's gradient comes from it: the loss may
fall on, but it teaches the student nothing any more."""


@dataclass(frozen=True)
class TargetHealth:
    """Variance over tokens, averaged over channels, and effective rank, averaged over layers, key and value.
    `full_rank` is the most that the batch could have: of its tokens or its features the fewer."""

    variance: float
    effective_rank: float
    full_rank: int

    @property
    def rank_share(self) -> float:
        """Batches differ in length: what they could have is what their rank is held against."""
        return self.effective_rank / self.full_rank


def target_health(target: Float[Tensor, "L 2 B H T D"], mask: Int[Tensor, "B T"]) -> TargetHealth:
    """Health of one batch's target over its real tokens."""
    tokens = token_features(target, mask).flatten(0, 1).float()
    centred = tokens - tokens.mean(1, keepdim=True)
    return TargetHealth(
        variance=float(centred.square().mean()),
        # Through the Gram matrix: a decomposition of [F, F], however many tokens.
        effective_rank=sum(effective_rank(rows.T @ rows) for rows in centred.double()) / len(centred),
        full_rank=max(1, min(centred.shape[1:])),
    )


def gradient_share(student: nn.Module, kv_loss: Float[Tensor, ""], loss: Float[Tensor, ""]) -> float:
    """How much of the student's gradient is the KV loss's: its norm over the sum of its own and the rest's. The graph
    is kept."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    both = [torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True) for part in (kv_loss, loss)]
    own = rest = 0.0
    for kv, whole in zip(*both, strict=True):
        if whole is not None:
            kv = torch.zeros_like(whole) if kv is None else kv
            own, rest = own + float(kv.square().sum()), rest + float((whole - kv).square().sum())
    norms = math.sqrt(own), math.sqrt(rest)
    return norms[0] / max(sum(norms), 1e-12)


def effective_rank(gram: Float[Tensor, "F F"]) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli, 2007) of centred rows `[N, F]` whose Gram
    matrix, or covariance, this is: from 1 to min(N, F)."""
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


class CollapseMonitor:
    """Compares the target's variance and rank with what they were at the start of the run. `gradient_share` is that of
    the KV loss when it was last looked at."""

    def __init__(self) -> None:
        self.initial: TargetHealth | None = None
        self.latest: TargetHealth | None = None
        self.gradient_share: float | None = None

    @property
    def collapsed(self) -> bool:
        if self.initial is None or self.latest is None:
            return False
        return (
            self.latest.variance < COLLAPSE_RATIO * self.initial.variance
            or self.latest.rank_share < COLLAPSE_RATIO * self.initial.rank_share
        )

    @property
    def absorbed(self) -> bool:
        return self.gradient_share is not None and self.gradient_share < ABSORBED_SHARE

    def update(self, target: Float[Tensor, "L 2 B H T D"], mask: Int[Tensor, "B T"]) -> TargetHealth:
        self.latest = target_health(target, mask)
        self.initial = self.initial or self.latest
        return self.latest

    def save(self, folder: Path) -> None:
        """Write `monitor.json`: a resumed run is still held against its start."""
        health = [asdict(health) if health is not None else None for health in (self.initial, self.latest)]
        (folder / "monitor.json").write_text(json.dumps([*health, self.gradient_share]))

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote."""
        *health, share = json.loads((folder / "monitor.json").read_text())
        self.gradient_share = float(share) if share is not None else None
        self.initial, self.latest = (TargetHealth(**found) if found is not None else None for found in health)

    def error(self) -> CollapseError:
        """What happened, for the user. Only after `collapsed`."""
        assert self.initial is not None
        assert self.latest is not None
        return CollapseError(
            "the distillation target collapsed: the KV loss falls because the target shrinks",
            expected=f"at least {COLLAPSE_RATIO:.0%} of its initial variance {self.initial.variance:.3g} and effective "
            f"rank {self.initial.effective_rank:.1f}",
            found=f"{self.latest.variance:.3g} and {self.latest.effective_rank:.1f}",
            remedy="Use the default --direction student-to-teacher, whose target is fixed, or --on-collapse warn",
        )
