"""`kvpipe models`"""

from __future__ import annotations

import typer


def models() -> None:
    """List the built-in teachers and students with their sizes."""
    from transformers import AutoConfig

    from ..pipeline.models import builtin_students, builtin_teachers

    for role, found in (("teacher", builtin_teachers()), ("student", builtin_students())):
        for name, folder in found.items():
            config = AutoConfig.from_pretrained(folder)
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
            weights = folder / "model.safetensors"
            size = f"{weights.stat().st_size / 1e6:.1f} MB" if weights.exists() else "random weights"
            typer.echo(
                f"{name:10} {role:8} {config.model_type:8} {config.num_hidden_layers} layers, "
                f"{heads} KV heads of {head_dim}, {size}"
            )
