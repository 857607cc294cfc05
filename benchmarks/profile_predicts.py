"""Does the R2 that `kvpipe profile` finds before training predict the trained student? Spearman's rank correlation over
the arms of a finished experiment that train a linear map of the student's KV, with the mean held-out cross-entropy.

`python benchmarks/profile_predicts.py reports/alignment/results.json`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Any

from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.map_quality import MAPS
from kvpipe.pipeline.profile import Profile, profile
from scipy.stats import spearmanr
from side_by_side import quiet

SEEDS, SAMPLES = 4, 256

MATCHED = {key: name for name, key in MAPS.items()} | {("structured", "structured"): "structured"}


def recipe(run: dict[str, Any]) -> DistillConfig:
    return DistillConfig(**{field.name: run["record"]["config"][field.name] for field in fields(DistillConfig)})


def is_profiled(config: DistillConfig) -> bool:
    """Whether a recipe trains one of the maps that a profile fits, on the KV as it is."""
    kind = (config.mode, config.match_params)
    trained = (config.kv_loss, config.direction, config.start) == ("mse", "student-to-teacher", "random")
    return kind in MATCHED and config.share_dim_proj and trained and config.kv_control == "none"


def found_r2(configs: Iterable[DistillConfig], stores: Iterable[str], profiles: dict[Any, Profile]) -> float:
    """The mean R2 of keys and values over the first seeds. Arms that differ in the map alone share a profile."""
    values = []
    for config, store in zip(configs, stores, strict=True):
        key = (config.layer_map, config.key_space, config.seed, store)
        if key not in profiles:
            profiles[key] = profile(config, Path(store), samples=SAMPLES, device="cpu", progress=quiet())
        values.append(profiles[key].map_named(MATCHED[config.mode, config.match_params]).mean)
    return mean(values)


def main(report: Path) -> None:
    runs = json.loads(report.read_text())["runs"]
    profiles: dict[Any, Profile] = {}
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        configs = [recipe(run) for run in own]
        if is_profiled(configs[0]):
            stores = [run["record"]["stores"][0]["path"] for run in own]
            r2 = found_r2(configs[:SEEDS], stores[:SEEDS], profiles)
            rows.append((arm, r2, mean(run["scores"]["ce"] for run in own)))
    print("| arm | R2 before training | ce after |\n|---|---|---|")  # noqa: T201
    for arm, r2, ce in sorted(rows, key=lambda row: -row[1]):
        print(f"| {arm} | {r2:.3f} | {ce:.4f} |")  # noqa: T201
    # A better map should go with a lower loss.
    found = spearmanr([-r2 for _, r2, _ in rows], [ce for _, _, ce in rows])
    print(f"\nSpearman's rho {found.statistic:.2f} (p {found.pvalue:.2f}, {len(rows)} arms)")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
