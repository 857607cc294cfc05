"""`kvpipe bench`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..pipeline.bench import Bench
    from ..pipeline.bench_writing import Writing
    from ..pipeline.timing import Timed


def bench(
    store: Annotated[
        Path | None, typer.Argument(help="A store written by `kvpipe extract`. \\[default: the only one under stores/]")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples in a batch.")] = 16,
) -> None:
    """Measure how fast this machine reads a store, in batches as `distill` does, beside plain reading of its files.
    Tokens count where their KV is kept.

    And how fast it writes shards of it, beside plain writing of as many bytes, both flushed to the disk: into a folder
    beside the store, removed at the end.
    """
    from ..pipeline.bench import bench as run
    from ..pipeline.distill import find_store

    path = find_store(store)
    for name, value in _rows(run(path, batch_size)).items():
        typer.echo(f"{name:20} {value}")


def _rows(found: Bench) -> dict[str, str]:
    return {
        "what is read": f"KV{' and queries' if found.queries else ''}, kept as {found.codec}",
        "open to first batch": f"{found.first_batch_seconds:.2f} s",
        "plain reading": _rate(found, found.plain),
        "shuffled epoch": f"{_rate(found, found.stream)}, {_share(found, found.stream)}",
        "random batches": f"{_rate(found, found.random)}, {_share(found, found.random)}",
        **_writing_rows(found.writing, found.codec),
    }


def _writing_rows(writing: Writing | str, codec: str) -> dict[str, str]:
    if isinstance(writing, str):
        return {"writing": f"not measured: {writing}"}
    plain, shards = (f"{writing.num_bytes / taken.seconds / 1e9:.3g} GB/s" for taken in (writing.plain, writing.shards))
    share = f"{writing.plain.seconds / writing.shards.seconds:.2f} of plain writing{_included('encoding', codec)}"
    return {"plain writing": plain, "writing shards": f"{shards}, {share}"}


def _rate(found: Bench, taken: Timed) -> str:
    rate, first = (found.num_bytes / seconds / 1e9 for seconds in (taken.seconds, taken.first_seconds))
    tokens, each = found.tokens / taken.seconds, 1000 * taken.seconds / found.batches
    return f"{rate:.3g} GB/s (first pass {first:.3g}), {tokens:,.0f} tokens/s, {each:.2f} ms a batch"


def _share(found: Bench, taken: Timed) -> str:
    return f"{found.plain.seconds / taken.seconds:.2f} of plain reading{_included('decoding', found.codec)}"


def _included(work: str, codec: str) -> str:
    return "" if codec == "raw" else f", {work} {codec} included"
