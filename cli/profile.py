"""`kvpipe profile`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..pipeline.profile import Profile
    from ..pipeline.survey import Side


def profile(
    store: Annotated[
        Path | None, typer.Argument(help="A store written by `kvpipe extract`. \\[default: the only one under stores/]")
    ] = None,
    student: Annotated[str, typer.Option(help="A built-in name, a folder, a config.json or a Hub id.")] = "tiny",
    random_init: Annotated[
        bool, typer.Option("--random-init", help="Start from random weights even where there are trained ones.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Look at the first so many training samples, or all there are.")] = 256,
    layer_map: Annotated[
        str, typer.Option(help="For the maps and losses: ratio, skip, uniform, last, cka, or a JSON file.")
    ] = "ratio",
    time_map: Annotated[str, typer.Option(help="As of `distill`.")] = "auto",
    key_space: Annotated[str, typer.Option(help="post-rope or pre-rope, as of `distill`.")] = "post-rope",
    seed: Annotated[int, typer.Option(help="Of a random student, and of projections that start at random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with heat maps.")] = None,
    save_layer_map: Annotated[
        Path | None, typer.Option(help="Write the suggested layer map, a .json file for --layer-map of `distill`.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Say what a store and a student have in common, before any training: which layers, by which map, at what cost.

    Nothing but a copy of the student is trained, for a few timed steps. The teacher is never loaded.
    """
    from ..kvcache.align.layer_map import write_layer_map
    from ..pipeline.config import DistillConfig
    from ..pipeline.distill import find_store
    from ..pipeline.profile import profile as run
    from ..pipeline.profile_page import write_profile_page

    given = {
        "mode": "flat",
        "student": student,
        "random_init": random_init,
        "layer_map": layer_map,
        "time_map": time_map,
        "key_space": key_space,
        "seed": seed,
    }
    config = DistillConfig.from_mapping(given, "the command line: {}".format)
    _require_outputs(html, save_layer_map)
    found = run(config, find_store(store), samples=samples, device=device)
    # First: whatever becomes of the files, what was found is not lost.
    typer.echo(json.dumps(asdict(found), indent=2) if as_json else "\n".join(_lines(found)))
    if html is not None:
        write_profile_page(found, html)
    if save_layer_map is not None:
        write_layer_map(found.similarity.layer_map, save_layer_map)


def _require_outputs(html: Path | None, layer_map: Path | None) -> None:
    """Before anything is looked at: raise ConfigError for files that cannot both be written."""
    from ..kvcache.errors import ConfigError

    if layer_map is not None and layer_map.suffix != ".json":
        raise ConfigError(
            "no such layer map file", expected="a .json file", found=layer_map, remedy="Mend --save-layer-map"
        )
    for option, path in (("--html", html), ("--save-layer-map", layer_map)):
        if path is not None and path.is_dir():
            raise ConfigError(
                f"{option} cannot be written", expected="a file", found=f"the folder {path}", remedy=f"Mend {option}"
            )
    if html is not None and layer_map is not None and html.resolve() == layer_map.resolve():
        raise ConfigError(
            "one file for two outputs", expected="a place of its own for --html", found=html, remedy="Mend --html"
        )


def _lines(found: Profile) -> Iterator[str]:
    from ..pipeline.profile_advice import advice

    rows = {
        "store": f"{found.store}, {_side(found.teacher)}",
        "student": f"{found.student.name}, {_side(found.student)}{', random' if found.random_student else ''}",
        "looked at": f"{found.samples:,} samples, {found.tokens:,} tokens; {_broken(found)}",
        "tokens": f"{found.token_coverage:.1%} have a counterpart, {found.one_to_one_share:.1%} one to one",
        "effective rank": f"teacher {_ranks(found.teacher)}, student {_ranks(found.student)}",
    }
    for quality in found.maps:
        key, value = quality.mean_r2
        rows[f"R2, {quality.name}"] = f"keys {key:.3f}, values {value:.3f} ({quality.parameters:,} parameters)"
    for mode, loss in found.start_loss.items():
        rows[f"KV loss at start, {mode}"] = f"{loss.random:.2f} at random, {loss.closed_form:.2f} in closed form"
    for mode, cost in found.steps.items():
        state = f"{cost.state_bytes / 1e6:,.1f} MB of weights, gradients and AdamW"
        rows[f"step of {cost.batch_size}, {mode}"] = f"{1000 * cost.seconds:,.1f} ms, {state}"
    yield from (f"{name:30} {value}" for name, value in rows.items())
    yield ""
    yield from advice(found)


def _side(side: Side) -> str:
    return f"{len(side.layers)} layers of {side.num_kv_heads} KV heads of {side.head_dim} channels, {side.dtype}"


def _broken(found: Profile) -> str:
    numbers = found.teacher.nonfinite + found.student.nonfinite
    return f"{numbers:,} numbers not finite, {found.excluded_samples:,} samples of the store excluded"


def _ranks(side: Side) -> str:
    """The mean over layers."""
    means = []
    for kind in ("key", "value"):
        ranks = [row.effective_rank for row in side.statistics if row.kind == kind]
        means.append(f"{sum(ranks) / len(ranks):.1f}")
    return f"{' and '.join(means)} of {side.num_kv_heads * side.head_dim}"
