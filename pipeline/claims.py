"""Whether an arm may be said to profit from the teacher's KV: it has to beat every control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .config import DistillConfig
from .experiment_config import ExperimentConfig
from .kv_controls import KVControlName
from .stats import Comparison

CONTROLS = ("no KV", "shuffled KV", "random KV")


@dataclass(frozen=True)
class Claim:
    """That the teacher's KV helps `arm`. `beaten` and `unbeaten` are controls by the arm that each is, `missing` those
    that the experiment does not compare the arm with."""

    arm: str
    beaten: dict[str, str]
    unbeaten: dict[str, str]
    missing: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.unbeaten and not self.missing


def claims(config: ExperimentConfig, comparisons: Sequence[Comparison]) -> list[Claim]:
    """One for every arm that the experiment compares with any control of it, on the primary metric."""
    found = []
    for arm in config.arms:
        controls = {kind: c for c in comparisons if c.arm == arm and (kind := _kind(config, arm, c.control))}
        if controls:
            beaten, unbeaten = (
                {kind: c.control for kind, c in controls.items() if (c.verdict == "better") is better}
                for better in (True, False)
            )
            found.append(Claim(arm, beaten, unbeaten, tuple(kind for kind in CONTROLS if kind not in controls)))
    return found


def _kind(config: ExperimentConfig, arm: str, control: str) -> str | None:
    """Which control of `arm` another arm is, if any: the same recipe and store without the KV, its order or its
    content."""
    recipe, other = config.arms[arm], config.arms[control]
    if recipe.mode == "none" or recipe.kv_control != "none":
        return None
    if other.mode == "none":
        return "no KV"
    if config.store_of(arm) != config.store_of(control):
        return None
    return {_controlled(recipe, "shuffled"): "shuffled KV", _controlled(recipe, "random"): "random KV"}.get(other)


def _controlled(recipe: DistillConfig, control: KVControlName) -> DistillConfig:
    return replace(recipe, kv_control=control)
