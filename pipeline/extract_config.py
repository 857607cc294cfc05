"""The options of an extraction, as the command line and an experiment file know them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ..data.corpus import BUILTIN_DATASET
from ..data.sample import select_segments
from ..kvcache.codec import require_codec
from ..kvcache.errors import ConfigError
from ..kvcache.evict import require_eviction
from ..kvcache.writer import OnNonfinite
from .fields import flags

MAX_SEED = 2**32
"""What NumPy's generator takes."""

Reasoning = Literal["dataset", "teacher"]
WrongAnswers = Literal["drop", "keep"]


@dataclass(frozen=True)
class ExtractConfig:
    """The options of `kvpipe extract`. Raises ConfigError or DataError for what is none of them."""

    model: str
    store: Path
    dataset: str = BUILTIN_DATASET
    samples: int | None = None
    eval_samples: int = 256
    max_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | None = None
    max_shard_bytes: int = 64_000_000
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    reasoning: Reasoning = "dataset"
    temperature: float = 0.0
    max_new_tokens: int = 256
    wrong_answers: WrongAnswers = "drop"
    on_nonfinite: OnNonfinite = "exclude"
    codec: str = "raw"
    layers: str = "all"
    segments: str = "all"
    evict: str = "none"
    budget: float | None = None
    queries: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError("no such batch", expected="at least 1", found=self.batch_size, remedy="Mend --batch-size")
        if not 0 <= self.seed < MAX_SEED:
            raise ConfigError(
                "no such seed", expected="0 or more, and less than 2**32", found=self.seed, remedy="Mend --seed"
            )
        require_codec(self.codec)
        select_segments(self.segments)
        require_eviction(self.evict, self.budget)
        _require_reasoning(self)

    def flags(self) -> list[str]:
        """The options of `kvpipe extract` that give this config; defaults are left out."""
        return flags(self, max_shard_bytes=lambda size: ["--max-shard-size", f"{size}B"])

    @property
    def reasoning_identity(self) -> str:
        """Who writes the reasoning, and how, as the manifest says it."""
        if self.reasoning == "dataset":
            return "dataset"
        how = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"teacher ({how}, {self.max_new_tokens} new tokens at most, wrong answers: {self.wrong_answers})"


def _require_reasoning(config: ExtractConfig) -> None:
    """Raise ConfigError for options of generation that are out of range, or have no effect."""
    if not 0 <= config.temperature < float("inf"):
        raise ConfigError(
            "no such temperature", expected="0 (greedy) or more", found=config.temperature, remedy="Mend --temperature"
        )
    if config.max_new_tokens < 1:
        raise ConfigError(
            "no such length", expected="at least 1", found=config.max_new_tokens, remedy="Mend --max-new-tokens"
        )
    defaults = {field.name: field.default for field in fields(config)}
    for name in ("temperature", "max_new_tokens", "wrong_answers"):
        if config.reasoning == "dataset" and (found := getattr(config, name)) != defaults[name]:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} has no effect on reasoning from the data set",
                expected="it with --reasoning teacher",
                found=found,
                remedy=f"Add --reasoning teacher, or leave {option} out",
            )


def default_store(model: str) -> Path:
    """`stores/<model>.zarr`: the last part of a Hub id or folder."""
    return Path("stores") / f"{Path(model).name}.zarr"
