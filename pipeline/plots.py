"""The report's figures, as SVG text that fits a light and a dark page."""

from __future__ import annotations

import io
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from .results import Results

# Okabe & Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
INK = "#808080"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvpipe",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""Neither a date, which would change every report, nor links."""


@mpl.rc_context(STYLE)
def learning_curves(results: Results) -> str:
    """Held-out cross-entropy by step: the mean of each arm's seeds, and their range."""
    figure, axes = _figure(6.4, 3.6)
    for arm, colour in zip(results.arms(), cycle(COLOURS), strict=False):
        curves = [run.curve for run in results.runs if run.arm == arm and run.curve]
        length = min(map(len, curves), default=0)
        if length == 0:
            continue
        steps = [step for step, _ in curves[0][:length]]
        values = np.array([[value for _, value in curve[:length]] for curve in curves])
        axes.plot(steps, values.mean(0), color=colour, label=arm, marker="o", markersize=3)
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("held-out cross-entropy (nats)")
    if axes.lines:
        axes.legend()
    return svg(figure)


@mpl.rc_context(STYLE)
def paired_differences(results: Results) -> str:
    """Every seed's difference on the primary metric, with the mean, its interval and the margin that was declared."""
    comparisons = results.comparisons[results.primary_metric]
    figure, axes = _figure(6.4, 0.8 + 0.5 * len(comparisons))
    axes.axvline(0, color=INK, linewidth=0.8)
    for row, comparison in enumerate(reversed(comparisons)):
        axes.plot(comparison.differences, [row] * comparison.num_seeds, "o", color=COLOURS[0], alpha=0.6, zorder=3)
        axes.plot(comparison.headline, [row, row], color=COLOURS[1], linewidth=2)
        if comparison.margin is not None:
            axes.plot([-comparison.margin, comparison.margin], [row, row], "|", color=INK, markersize=14)
        # Hollow: seeds that lie close to the mean show through.
        axes.plot([comparison.mean_difference], [row], "D", color=COLOURS[1], markersize=9, markerfacecolor="none")
    labels = [f"{c.arm} - {c.control}{f', within {c.margin:g}' if c.margin else ''}" for c in reversed(comparisons)]
    axes.set_yticks(range(len(comparisons)), labels)
    axes.set_xlabel(f"difference in {results.primary_metric}, one dot a seed; mean, CI and margin")
    return svg(figure)


@mpl.rc_context(STYLE)
def frontier(results: Results) -> str:
    """What a store's bytes buy: every comparison of arms that read different stores, by the bytes a token of the arm's.
    The control is at zero, the margin around it, and arms without KV are lines."""
    figure, axes = _figure(7.6, 3.8)
    axes.axhline(0, color=INK, linewidth=0.8)
    without_kv = {run.arm for run in results.runs if run.record["config"]["mode"] == "none"}
    for margin in {c.margin for c in results.comparisons[results.primary_metric] if c.margin is not None}:
        axes.axhspan(-margin, margin, color=INK, alpha=0.08, linewidth=0)
    styles = zip(cycle("osD^vP"), cycle(COLOURS), strict=False)
    for comparison, (marker, colour) in zip(results.comparisons[results.primary_metric], styles, strict=False):
        arm, mean = comparison.arm, comparison.mean_difference
        if arm in without_kv:
            axes.axhline(mean, color=colour, linestyle="--", label=f"{arm} (no KV)")
        elif results.arm_stores[arm] != results.arm_stores[comparison.control]:
            low, high = comparison.headline
            ends = [[mean - low], [high - mean]]
            place = results.bytes_per_token(arm)
            axes.errorbar(place, mean, ends, color=colour, marker=marker, capsize=3, linestyle="", label=arm)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bytes a token on disk")
    axes.set_ylabel(f"difference in {results.primary_metric}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure)


@mpl.rc_context(STYLE)
def weights_of_teachers(results: Results) -> str:
    """How much each teacher counted on held-out tokens by step, a panel for every arm whose weights are not fixed:
    every seed, and the mean of all. Empty where there is no such arm."""
    routed = [run for run in results.runs if run.weights and run.record["config"]["fusion"] != "fixed"]
    arms = list(dict.fromkeys(run.arm for run in routed))
    if not arms:
        return ""
    figure = Figure(figsize=(6.4, 0.6 + 1.5 * len(arms)), layout="constrained")
    panels = figure.subplots(len(arms), squeeze=False, sharex=True)[:, 0]
    colours = dict(zip(dict.fromkeys(p for arm in arms for p in results.arm_stores[arm]), cycle(COLOURS), strict=False))
    for arm, axes in zip(arms, panels, strict=True):
        curves = [run.weights for run in routed if run.arm == arm]
        length = min(map(len, curves))
        steps = [step for step, _ in curves[0][:length]]
        values = np.array([[weights for _, weights in curve[:length]] for curve in curves])
        for number, place in enumerate(results.arm_stores[arm]):
            of_teacher, colour = values[:, :, number], colours[place]
            axes.plot(steps, of_teacher.T, color=colour, alpha=0.35, linewidth=0.8)
            axes.plot(steps, of_teacher.mean(0), color=colour, label=Path(place).stem, marker="o", markersize=3)
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(arm, loc="left", fontsize=10)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    panels[-1].set_xlabel("training step")
    figure.supylabel("weight")
    return svg(figure)


@mpl.rc_context(STYLE)
def time_by_part(results: Results) -> str:
    """Mean seconds of an arm's runs, by part."""
    figure, axes = _figure(6.4, 0.8 + 0.45 * len(results.arms()))
    parts = ("setup", "train", "data_wait", "evaluation")
    for row, arm in enumerate(reversed(results.arms())):
        seconds = [run.record["seconds"] for run in results.runs if run.arm == arm]
        means = {part: float(np.mean([s[part] for s in seconds])) for part in parts}
        means["train"] -= means["data_wait"]
        left = 0.0
        for part, colour in zip(parts, COLOURS, strict=False):
            axes.barh(row, means[part], left=left, color=colour, label=part if row == 0 else None)
            left += means[part]
    axes.set_yticks(range(len(results.arms())), list(reversed(results.arms())))
    axes.set_xlabel("seconds a run")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def svg(figure: Figure) -> str:
    """A figure as an element of a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
    return text.getvalue()[text.getvalue().index("<svg") :]
