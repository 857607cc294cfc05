"""Whether an arm may be said to profit from the teacher's KV: it has to beat every control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .config import DistillConfig
from .experiment_config import ExperimentConfig
from .kv_controls import KVControlName
from .stats import Comparison

CONTROLS = ("no KV", "shuffled KV", "random KV")


TRAINING = ("learning_rate", "weight_decay", "warmup_ratio", "bf16")
"""Of a recipe, what trains a student without KV as well and is not the same for all arms by the file's rules."""


@dataclass(frozen=True)
class Claim:
    """That the teacher's KV helps `arm`. `beaten` and `unbeaten` are kinds of controls with the arms that each is,
    `missing` kinds that the experiment does not compare the arm with."""

    arm: str
    beaten: dict[str, tuple[str, ...]]
    unbeaten: dict[str, tuple[str, ...]]
    missing: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.unbeaten and not self.missing


def claims(config: ExperimentConfig, comparisons: Sequence[Comparison]) -> list[Claim]:
    """One for every arm that the experiment compares with any control of it, on the primary metric. Of several controls
    of a kind all have to be beaten; one that is asked for with and without a margin is, where either says so."""
    found = []
    for arm in config.arms:
        verdicts = {
            control: {c.verdict for c in comparisons if (c.arm, c.control) == (arm, control)} for control in config.arms
        }
        kinds = {control: kind for control, said in verdicts.items() if said and (kind := _kind(config, arm, control))}
        beaten, unbeaten = (
            _by_kind({control: kind for control, kind in kinds.items() if ("better" in verdicts[control]) is better})
            for better in (True, False)
        )
        if kinds:
            found.append(Claim(arm, beaten, unbeaten, tuple(kind for kind in CONTROLS if kind not in kinds.values())))
    return found


def _by_kind(kinds: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {kind: tuple(control for control in kinds if kinds[control] == kind) for kind in kinds.values()}


def _kind(config: ExperimentConfig, arm: str, control: str) -> str | None:
    """Which control of `arm` another arm is, if any: the same recipe and stores without the KV, its order or its
    content."""
    recipe, other = config.arms[arm], config.arms[control]
    if recipe.mode == "none" or recipe.kv_control != "none":
        return None
    if other.mode == "none":
        return "no KV" if all(getattr(recipe, name) == getattr(other, name) for name in TRAINING) else None
    if config.stores_of(arm) != config.stores_of(control):
        return None
    return {_controlled(recipe, "shuffled"): "shuffled KV", _controlled(recipe, "random"): "random KV"}.get(other)


def _controlled(recipe: DistillConfig, control: KVControlName) -> DistillConfig:
    return replace(recipe, kv_control=control)
