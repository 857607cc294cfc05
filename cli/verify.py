"""`kvpipe verify`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(store: Annotated[Path, typer.Argument(help="A store written by `kvpipe extract`.")]) -> None:
    """Read a whole store against its checksums. Names every damaged shard and its samples."""
    from ..kvcache.store import KVStore
    from ..kvcache.verify import describe, require_side_arrays, require_sound
    from ..pipeline.progress import progress_bar
    from ..pipeline.repair import find_damages

    opened = KVStore.open(store)
    require_side_arrays(opened)
    with progress_bar() as bar:
        damages = find_damages(opened, bar)
    for line in describe(damages):
        typer.echo(line)
    require_sound(opened, damages)
    queries = ", queries included" if opened.manifest.queries else ""
    typer.echo(f"{store} is sound: {opened.num_shards} shards, {opened.num_samples} samples{queries}.")
