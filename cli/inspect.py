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
    from ..kvcache.manifest import flatten
    from ..kvcache.store import KVStore
    from ..kvcache.summary import summarise

    summary = summarise(KVStore.open(store))
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    manifest = flatten(summary.pop("manifest"))
    for name, value in (summary | manifest).items():
        typer.echo(f"{name.replace('_', ' '):22} {_shown(value)}")


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)
