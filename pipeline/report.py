"""The report of an experiment: `results.json`, one HTML page, and the same in Markdown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from ..kvcache.files import write_atomic
from .plots import frontier, learning_curves, paired_differences, time_by_part
from .results import Results, arm_summary
from .stats import MIN_SEEDS, Comparison


def write_report(results: Results, folder: Path) -> Path:
    """Write `results.json`, `report.html` (self-contained) and `report.md` into `folder`; return the page."""
    figures = {
        "learning_curves": learning_curves(results),
        "paired_differences": paired_differences(results),
        "time_by_part": time_by_part(results),
    }
    if len(results.stores) > 1:
        figures["frontier"] = frontier(results)
    environment = Environment(
        loader=PackageLoader("kvpipe.pipeline", "templates"),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "p": p_value}
    context: dict[str, Any] = {
        "results": results,
        "sentences": [sentence(c) for c in results.comparisons[results.primary_metric]],
        "summary": {metric: arm_summary(results, metric) for metric in results.comparisons},
        "figures": figures,
        "min_seeds": MIN_SEEDS,
    }
    for name in ("report.html", "report.md"):
        write_atomic(folder / name, environment.get_template(f"{name}.jinja").render(context).encode())
    for name, svg in figures.items():
        write_atomic(folder / f"{name}.svg", svg.encode())
    write_atomic(folder / "results.json", (json.dumps(_finite(results.to_dict()), indent=1) + "\n").encode())
    return folder / "report.html"


def sentence(comparison: Comparison) -> str:
    """A comparison in words: the verdict with its number, interval and p-value."""
    c = comparison
    test = "Holm-adjusted p" if c.margin is None else f"Holm-adjusted p of a difference within {c.margin:g}"
    numbers = (
        f"difference in {c.metric} {number(c.mean_difference)}, "
        f"{c.confidence:.0%} CI {number(c.ci_low)} to {number(c.ci_high)}, "
        f"{test} {p_value(c.p_adjusted)}, {c.num_seeds} paired seeds"
    )
    if c.verdict == "no verdict":
        return (
            f"{c.arm} against {c.control}: no verdict ({numbers}; a verdict needs {MIN_SEEDS} seeds and some spread)."
        )
    if c.verdict == "inconclusive":
        return f"{c.arm} against {c.control}: inconclusive ({numbers})."
    if c.verdict in ("equivalent", "not equivalent"):
        return f"{c.arm} is {c.verdict} to {c.control} ({numbers})."
    return f"{c.arm} is {c.verdict} than {c.control} ({numbers})."


def number(value: float | None) -> str:
    """Four decimals; an em dash for what could not be computed."""
    return "—" if value is None or math.isnan(value) else f"{value:.4f}"


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
