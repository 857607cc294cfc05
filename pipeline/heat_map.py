"""A matrix of shares as SVG text that fits a light and a dark page, narrow enough for a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .plots import COLOURS, STYLE, svg

WIDTH = 3.1
"""Inches: at a phone's width a page shows it as large as it is."""

WRITTEN_COLUMNS = 8
"""With more, numbers do not fit into their cells: the colour has to do."""

COLOUR_MAP = "cividis"
"""Told apart by colour-blind readers too; from dark to light."""


@mpl.rc_context(STYLE)
def heat_map(
    matrix: Sequence[Sequence[float]],
    row_numbers: Sequence[int],
    *,
    rows: str,
    columns: str,
    column_numbers: Sequence[int] | None = None,
    marked: Sequence[tuple[int, int]] = (),
) -> str:
    """Colours run from 0 or less to 1. `rows` and `columns` name the axes; `marked` cells (row, column) are framed."""
    values = np.array(matrix)
    height, width = values.shape
    cell = 0.28 if width <= WRITTEN_COLUMNS else 0.14
    figure = Figure(figsize=(WIDTH, 0.6 + cell * max(height, 3)), layout="constrained")
    axes = figure.add_subplot()
    axes.pcolormesh(values, cmap=COLOUR_MAP, vmin=0, vmax=1)
    if width <= WRITTEN_COLUMNS:
        for (row, column), value in np.ndenumerate(values):
            ink = "black" if value > 0.5 else "white"
            axes.text(column + 0.5, row + 0.5, f"{value:z.2f}", ha="center", va="center", color=ink, fontsize=8)
    for row, column in marked:
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=2))
    _ticks(axes.set_yticks, row_numbers)
    _ticks(axes.set_xticks, range(width) if column_numbers is None else column_numbers)
    axes.invert_yaxis()
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    axes.tick_params(length=0)
    return svg(figure)


def _ticks(set_ticks: Callable[..., Any], numbers: Sequence[int]) -> None:
    """In the middle of cells, and not of all where there are many."""
    places = range(0, len(numbers), -(-len(numbers) // 12))
    set_ticks([place + 0.5 for place in places], [str(numbers[place]) for place in places])
