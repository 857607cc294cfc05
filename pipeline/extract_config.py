"""The options of an extraction, as the command line and an experiment file know them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..data.corpus import BUILTIN_DATASET
from ..data.errors import DataError
from ..data.sample import select_segments
from ..kvcache.codec import CODECS
from ..kvcache.evict import NONE, POLICIES
from ..kvcache.layers import select_layers
from ..kvcache.writer import OnNonfinite
from .fields import FieldError, flags

MAX_SEED = 2**32
"""What NumPy's generator takes."""

Reasoning = Literal["dataset", "teacher"]
WrongAnswers = Literal["drop", "keep"]


@dataclass(frozen=True)
class ExtractConfig:
    """The options of `kvpipe extract`. Raises FieldError for values that make no sense."""

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
        for name in ("samples", "eval_samples", "batch_size", "max_shard_bytes", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise FieldError(name, "at least 1", getattr(self, name))
        if not 0 <= self.seed < MAX_SEED:
            raise FieldError("seed", "0 or more, and less than 2**32", self.seed)
        if self.codec not in CODECS:
            raise FieldError("codec", ", ".join(CODECS), self.codec)
        try:
            select_segments(self.segments)
        except DataError as error:
            raise FieldError("segments", "all, or some of prompt, reasoning, answer", repr(self.segments)) from error
        self._require_eviction()
        self._require_reasoning()

    def _require_eviction(self) -> None:
        if self.evict not in (NONE, *POLICIES):
            raise FieldError("evict", ", ".join((NONE, *POLICIES)), self.evict)
        budget = self.budget
        if (self.evict == NONE) != (budget is None):
            found = f"evict {self.evict} with {'no budget' if budget is None else f'budget {budget:g}'}"
            raise FieldError("budget", "both evict and budget, or neither", found)
        if budget is not None and not (0 < budget < 1 or (budget >= 1 and float(budget).is_integer())):
            expected = "a share of a sample's tokens below 1, or a whole number of tokens"
            raise FieldError("budget", expected, f"{budget:g}")

    def _require_reasoning(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise FieldError("temperature", "0 (greedy) or more", self.temperature)
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("temperature", "max_new_tokens", "wrong_answers"):
            if self.reasoning == "dataset" and (found := getattr(self, name)) != defaults[name]:
                raise FieldError(name, "it with --reasoning teacher alone", found)

    def declared(self, num_layers: int) -> dict[str, Any]:
        """What a manifest says that is known without the teacher, but for its number of layers. Raises ConfigError for
        layers that are not there."""
        return {
            "reasoning": self.reasoning_identity,
            "codec": self.codec,
            "layers": select_layers(self.layers, num_layers),
            "segments": select_segments(self.segments),
            "eviction": self.evict,
            "budget": self.budget,
            "queries": self.queries,
            "seed": self.seed,
        }

    def flags(self) -> list[str]:
        """The options of `kvpipe extract` that give this config; defaults are left out."""
        return flags(
            self,
            max_shard_bytes=lambda size: ["--max-shard-size", f"{size}B"],
            budget=lambda budget: ["--budget", str(budget if budget < 1 else int(budget))],
        )

    @property
    def reasoning_identity(self) -> str:
        """Who writes the reasoning, and how, as the manifest says it."""
        if self.reasoning == "dataset":
            return "dataset"
        how = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"teacher ({how}, {self.max_new_tokens} new tokens at most, wrong answers: {self.wrong_answers})"


def default_store(model: str) -> Path:
    """`stores/<model>.zarr`: the last part of a Hub id or folder."""
    return Path("stores") / f"{Path(model).name}.zarr"
