"""Training state as safetensors and JSON: it is data, and nothing in it is ever unpickled."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def save_optimizer(optimizer: Optimizer, scheduler: LRScheduler, folder: Path) -> None:
    """Write `optimizer.safetensors` (tensors) and `optimizer.json` (all the rest)."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}.{name}"] = value
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "optimizer.safetensors")
    rest = {"scalars": scalars, "param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    (folder / "optimizer.json").write_text(json.dumps(rest))


def load_optimizer(optimizer: Optimizer, scheduler: LRScheduler, folder: Path) -> None:
    """Put back what `save_optimizer` wrote."""
    rest = json.loads((folder / "optimizer.json").read_text())
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**load_file(folder / "optimizer.safetensors"), **rest["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    scheduler.load_state_dict(rest["scheduler"])


def save_rng(path: Path) -> None:
    """Write the state of the random generators of Python, NumPy and torch."""
    kind, keys, *position = np.random.get_state()
    document = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *position],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }
    path.write_text(json.dumps(document))


def load_rng(path: Path) -> None:
    """Put back what `save_rng` wrote."""
    document = json.loads(path.read_text())
    version, internal, gauss = document["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *position = document["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *position))
    torch.set_rng_state(torch.tensor(document["torch"], dtype=torch.uint8))
    if torch.cuda.is_available() and document["cuda"]:
        torch.cuda.set_rng_state_all([torch.tensor(state, dtype=torch.uint8) for state in document["cuda"]])
