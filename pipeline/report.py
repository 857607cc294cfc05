"""The report of an experiment: `results.json`, one HTML page, and its main parts in Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..kvcache.files import write_atomic
from .claims import Claim
from .pages import render
from .plots import frontier, learning_curves, paired_differences, time_by_part, weights_of_teachers
from .questions import LOWER_IS_BETTER
from .results import Results, RunResult, arm_summary
from .stats import MIN_SEEDS, POWER, Comparison
from .teacher_weights import COLLAPSED, layer_weights, teacher_weights


def write_report(results: Results, folder: Path) -> Path:
    """Write `results.json`, `report.html` (self-contained) and `report.md` into `folder`; return the page."""
    figures = {
        "learning_curves": learning_curves(results),
        "paired_differences": paired_differences(results),
        "time_by_part": time_by_part(results),
    }
    if len(results.stores) > 1:
        figures["frontier"] = frontier(results)
    if weights := weights_of_teachers(results):
        figures["teacher_weights"] = weights
    context: dict[str, Any] = {
        "results": results,
        "sentences": [sentence(c) for c in results.comparisons[results.primary_metric]],
        "claims": [claim_sentence(claim) for claim in results.claims],
        "summary": {metric: arm_summary(results, metric) for metric in results.comparisons},
        "training": {arm: training_summary(results.runs_of(arm)) for arm in results.arms()},
        "teachers": teacher_rows(results),
        "lower_is_better": LOWER_IS_BETTER,
        "figures": figures,
        "collapsed_weight": COLLAPSED,
        "min_seeds": MIN_SEEDS,
        "power": POWER,
    }
    for name in ("report.html", "report.md"):
        write_atomic(folder / name, render(f"{name}.jinja", context, FILTERS))
    for name, svg in figures.items():
        write_atomic(folder / f"{name}.svg", svg.encode())
    write_atomic(folder / "results.json", (json.dumps(_finite(results.to_dict()), indent=1) + "\n").encode())
    return folder / "report.html"


def training_summary(runs: list[RunResult]) -> dict[str, Any]:
    """What an arm's runs cost and how they went: means over its runs, and how many collapsed or were absorbed."""
    records = [run.record for run in runs]
    shares = [r["kv_gradient_share"] for r in records if r["kv_gradient_share"] is not None]
    return {
        "steps": records[0]["steps"],
        "tokens": sum(r["tokens"] for r in records) / len(records),
        "parameters": records[0]["parameters"],
        "seconds": sum(r["seconds"]["total"] for r in records) / len(records),
        "data_wait": sum(r["data_wait_share"] for r in records) / len(records),
        "kv_gradient_share": sum(shares) / len(shares) if shares else None,
        "collapsed": sum(bool(r["collapsed"]) for r in records),
        "absorbed": sum(bool(r["absorbed"]) for r in records),
    }


def teacher_rows(results: Results) -> list[dict[str, Any]]:
    """Of arms with several stores, how much each teacher counted on held-out tokens: mean and range over runs, the mean
    by layer where layers differ, and how many runs' routers collapsed."""
    rows = []
    for arm in results.arms():
        runs = results.runs_of(arm)
        for number, place in enumerate(results.arm_stores[arm] if len(results.arm_stores[arm]) > 1 else ()):
            weights = [found[number] for run in runs if (found := teacher_weights(run.record["metrics"]))]
            if not weights:
                continue
            layers = [found for run in runs if (found := layer_weights(run.record["metrics"], number))]
            rows.append(
                {
                    "arm": arm,
                    "teacher": Path(place).stem,
                    "mean": sum(weights) / len(weights),
                    "low": min(weights),
                    "high": max(weights),
                    "by_layer": [sum(layer) / len(layer) for layer in zip(*layers, strict=True)],
                    "collapsed": sum(bool(run.record["router_collapsed"]) for run in runs),
                }
            )
    return rows


def sentence(comparison: Comparison) -> str:
    """A comparison in words: the verdict with its number, interval and p-value."""
    c = comparison
    over = "over seeds" if math.isnan(c.crossed_low) else "over seeds and samples"
    low, high = c.headline
    seeds = f"{c.num_seeds} paired seed{'s' if c.num_seeds != 1 else ''}" + (
        f" of {c.num_seeds + len(c.missing_seeds)}" if c.missing_seeds else ""
    )
    numbers = (
        f"difference in {c.metric} {number(c.mean_difference)}, {c.confidence:.0%} CI {over} {number(low)} to "
        f"{number(high)}, {_deciding_p(c)}, {seeds}"
    )
    if c.verdict is None:
        needs = "all its runs" if c.unrun_seeds else f"{MIN_SEEDS} seeds and some spread"
        return f"{c.arm} against {c.control}: no verdict ({numbers}; a verdict needs {needs})."
    if c.verdict == "inconclusive":
        found = f"; {POWER:.0%} power for {number(c.minimum_detectable)}" if c.minimum_detectable > 0 else ""
        return f"{c.arm} against {c.control}: inconclusive ({numbers}{found})."
    if c.verdict == "equivalent":
        return f"{c.arm} is equivalent to {c.control} ({numbers})."
    beyond = f" by more than {c.margin:g}" if c.margin is not None else ""
    return f"{c.arm} is {c.verdict} than {c.control}{beyond} ({numbers})."


def _deciding_p(comparison: Comparison) -> str:
    c = comparison
    if c.margin is None:
        return f"Holm-adjusted p {p_value(c.p_adjusted)}"
    if c.verdict in ("better", "worse"):
        return f"Holm-adjusted p {p_value(c.p_beyond)} of a difference beyond {c.margin:g}"
    return f"Holm-adjusted p {p_value(c.p_adjusted)} of a difference within {c.margin:g}"


def claim_sentence(claim: Claim) -> str:
    """Whether the teacher's KV helps an arm, by all of its controls."""
    if claim.holds:
        return f"The teacher's KV helps {claim.arm}: it is better than {_listed(claim.beaten)}."
    reasons = []
    if claim.unbeaten:
        reasons.append(f"it is not shown to be better than {_listed(claim.unbeaten)}")
    if claim.missing:
        reasons.append(f"it is not compared with {' and '.join(claim.missing)}")
    return f"No claim that the teacher's KV helps {claim.arm}: {', and '.join(reasons)}."


def _listed(controls: dict[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{kind} ({', '.join(arms)})" for kind, arms in controls.items())


def number(value: float | None) -> str:
    """Four decimals; an em dash for what could not be computed."""
    return "—" if value is None or not math.isfinite(value) else f"{value:.4f}"


def interval(low: float, high: float) -> str:
    return "—" if math.isnan(low) else f"{number(low)} … {number(high)}"


def share(value: float | None) -> str:
    return "—" if value is None or math.isnan(value) else f"{value:.1%}"


def p_value(value: float) -> str:
    if math.isnan(value):
        return "—"
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _finite(document: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(document, dict):
        return {str(key): _finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


FILTERS: dict[str, Callable[..., str]] = {
    "number": number,
    "interval": interval,
    "p": p_value,
    "share": share,
    "count": "{:,.0f}".format,
}
"""What the templates of reports write numbers with."""
