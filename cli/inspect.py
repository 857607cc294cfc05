"""`kvpipe inspect`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    store: Annotated[Path, typer.Argument(help="A store written by `kvpipe extract`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in a store: shape, size, completeness, and where it came from."""
    from ..kvcache.store import KVStore

    summary = KVStore.open(store).summary()
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    manifest = summary.pop("manifest")
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), _shown(name, value))
    for name, value in manifest.items():
        table.add_row(name.replace("_", " "), json.dumps(value))
    Console(soft_wrap=True).print(table)


def _shown(name: str, value: object) -> str:
    if name.startswith("bytes") and isinstance(value, int | float):
        return f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
