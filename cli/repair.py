"""`kvpipe repair`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def repair(
    store: Annotated[Path, typer.Argument(help="A store written by `kvpipe extract`.")],
    model: Annotated[
        str | None, typer.Option(help="The store's teacher: a folder or a Hub id. \\[default: the built-in one]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples in a forward pass. \\[default: as when it was extracted]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a Hub model run its own code.")] = False,
) -> None:
    """Find a store's damaged shards and write exactly those anew, with its teacher."""
    from ..kvcache.verify import describe
    from ..pipeline.repair import repair as run

    mended = run(
        store,
        model=model,
        device=device,
        batch_size=batch_size,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    for line in describe(mended):
        typer.echo(line)
    typer.echo(f"{store}: {len(mended)} shards written anew." if mended else f"{store} is sound; nothing to do.")
