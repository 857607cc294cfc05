"""The options of an extraction, as the command line and an experiment file know them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from ..data.corpus import BUILTIN_DATASET
from ..kvcache.writer import OnNonfinite


@dataclass(frozen=True)
class ExtractConfig:
    """The options of `kvpipe extract`."""

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
    on_nonfinite: OnNonfinite = "exclude"
    codec: str = "raw"
    layers: str = "all"
    segments: str = "all"
    evict: str = "none"
    budget: float | None = None
    queries: bool = False

    def flags(self) -> list[str]:
        """The options of `kvpipe extract` that give this config; defaults are left out."""
        flags: list[str] = []
        for field in fields(self):
            value, name = getattr(self, field.name), field.name.replace("_", "-")
            if value == field.default:
                continue
            if field.name == "max_shard_bytes":
                flags += ["--max-shard-size", f"{value}B"]
            elif isinstance(value, bool):
                flags.append(f"--{name}")
            else:
                flags += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
        return flags


def default_store(model: str) -> Path:
    """`stores/<model>.zarr`: the last part of a Hub id or folder."""
    return Path("stores") / f"{Path(model).name}.zarr"
