"""`kvpipe report`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

report = typer.Typer(help="Look at the reports of experiments.", no_args_is_help=True)


@report.callback()
def group() -> None:
    pass


@report.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A report's folder, e.g. reports/ab.")],
    second: Annotated[Path, typer.Argument(help="Another's.")],
) -> None:
    """Compare two reports: what was declared differently, and what came out differently."""
    from rich.console import Console
    from rich.table import Table

    from ..pipeline.report_diff import diff_reports

    found = diff_reports(first, second)
    for title, differences in (("Declared", found.declared), ("Outcomes", found.outcomes)):
        if not differences:
            typer.echo(f"{title}: the same.")
            continue
        table = Table("", str(first), str(second), title=title, title_justify="left")
        for difference in differences:
            table.add_row(difference.what, *(_shown(side) for side in (difference.first, difference.second)))
        Console().print(table)


def _shown(value: object) -> str:
    return "—" if value is None else str(value)
