"""What `run.json` says of a run, beside its metrics and its costs."""

from __future__ import annotations

import platform
import resource
from importlib.metadata import version
from typing import Any

import torch

from ..kvcache.align.time_warp import Coverage
from ..kvcache.store import KVStore
from .config import DistillConfig
from .distiller import KVDistiller
from .models import teacher_forwards
from .trainer import DistillTrainer


def description(
    distiller: KVDistiller, trainer: DistillTrainer, config: DistillConfig, device: torch.device
) -> dict[str, Any]:
    """What ran, on what, and how it went, apart from its metrics and its costs."""
    learned_beside = _trainable(distiller) - _trainable(distiller.student)
    return {
        "config": config.to_dict(),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "parameters": {"student": _trainable(distiller.student), "aligner": learned_beside},
        "collapsed": trainer.monitor.collapsed,
        "kv_gradient_share": trainer.monitor.gradient_share,
        # What has nothing to train learns nothing in the student's place.
        "absorbed": trainer.monitor.absorbed and learned_beside > 0,
        "peak_memory_bytes": _peak_memory(device),
        "teacher_forwards": teacher_forwards(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }


def store_read(store: KVStore, covered: Coverage | None) -> dict[str, Any]:
    """Which store, how much of the teacher's KV it keeps, and how many of the student's tokens have a counterpart in
    it: None where no KV was read."""
    return {
        "path": str(store.path),
        "manifest": store.manifest.hash,
        "codec": store.codec.name,
        "lossy": store.lossy,
        "layers": list(store.manifest.layers),
        "tokens_kept": float(store.kv_length.sum() / store.length.sum()),
        "token_coverage": covered.share if covered is not None else None,
        "one_to_one_share": covered.one_to_one_share if covered is not None else None,
    }


def _versions() -> dict[str, str]:
    packages = ("kvpipe", "torch", "transformers", "zarr", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where one is used, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
