"""How large a projection is, so that two kinds can be compared at equal trainable size."""

from __future__ import annotations

from typing import Literal

from .head_projection import KVSpace

Match = Literal["none", "flat", "structured"]


def matched_size(mode: str, match: Match, source: KVSpace, target: KVSpace, *, share_dim_proj: bool) -> int | None:
    """The terms of a structured projection, the rank of a flat one (None: full) or the width of a bottleneck whose
    weights are as many as those of a plain flat or structured projection: at most so many, but for the least of 1.

    Biases are left out: all kinds have the same. Without a match: one term, full rank, and half the width of the
    narrower side.
    """
    maps = 1 if share_dim_proj else source.num_kv_heads
    term = maps * source.head_dim * target.head_dim + source.num_kv_heads * target.num_kv_heads
    one_more = term if mode == "structured" else source.features + target.features
    if match == "none" or match == mode:
        return {"structured": 1, "bottleneck": max(1, min(source.features, target.features) // 2)}.get(mode)
    budget = source.features * target.features if match == "flat" else term
    if mode == "bottleneck":
        # Its norm and its hidden bias count as weights.
        budget, one_more = budget - 2 * source.features, one_more + 1
    elif match == "flat" and mode == "flat-global":
        return None
    return max(1, budget // one_more)
