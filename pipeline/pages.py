"""Reports and profiles as pages that need nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def render(template: str, context: Mapping[str, Any], filters: Mapping[str, Callable[..., str]] | None = None) -> bytes:
    """A template of `templates/` with its variables, of which none may be missing."""
    environment = Environment(
        loader=PackageLoader("kvpipe.pipeline", "templates"),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(context).encode()
