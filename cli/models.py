"""`kvpipe models`"""

from __future__ import annotations

import json

import typer


def models() -> None:
    """List the built-in teachers and students with their sizes."""
    from ..pipeline.models import builtin_students, builtin_teachers

    for role, found in (("teacher", builtin_teachers()), ("student", builtin_students())):
        for name, folder in found.items():
            config = json.loads((folder / "config.json").read_text())
            weights = folder / "model.safetensors"
            size = f"{weights.stat().st_size / 1e6:.1f} MB" if weights.exists() else "random weights"
            typer.echo(
                f"{name:10} {role:8} {config['model_type']:8} {config['num_hidden_layers']} layers, "
                f"{config['num_key_value_heads']} KV heads of {config['head_dim']}, {size}"
            )
