"""Which teacher layers a student layer learns from, and how much of each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..errors import ConfigError
from ..files import write_atomic

TOLERANCE = 1e-6
"""How far the weights of a row may sum from 1."""

MAX_FILE_BYTES = 4_000_000
"""A map of several hundred layers on either side takes less."""


@dataclass(frozen=True)
class LayerMap:
    """A row of weights for every student layer, one for every teacher layer: at least 0, and 1 in all.

    Raises ConfigError for any other weights.
    """

    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        lengths = sorted({len(row) for row in self.weights})
        if len(lengths) != 1 or lengths == [0]:
            found = f"{len(self.weights)} rows of {' and '.join(map(str, lengths[:2])) or 'no'} weights"
            raise _refuse("no layer map", "rows of one length, a weight for every teacher layer", found)
        for layer, row in enumerate(self.weights):
            if not (all(math.isfinite(weight) and weight >= 0 for weight in row) and abs(sum(row) - 1) <= TOLERANCE):
                found = f"a sum of {sum(row):g}, the least {min(row):g}, for student layer {layer}"
                raise _refuse("no layer map", "weights from 0 to 1 that sum to 1", found)

    @classmethod
    def one_hot(cls, layers: Sequence[int], num_teacher_layers: int) -> LayerMap:
        """Every student layer learns from one teacher layer."""
        return cls(tuple(tuple(float(j == layer) for j in range(num_teacher_layers)) for layer in layers))

    @classmethod
    def identity(cls, num_layers: int) -> LayerMap:
        """Every layer learns from that of its own number."""
        return cls.one_hot(range(num_layers), num_layers)

    @property
    def num_student_layers(self) -> int:
        return len(self.weights)

    @property
    def num_teacher_layers(self) -> int:
        return len(self.weights[0])

    @property
    def used(self) -> tuple[int, ...]:
        """The teacher layers that anything is learned from."""
        return tuple(j for j, column in enumerate(zip(*self.weights, strict=True)) if any(column))

    @property
    def one_to_one(self) -> tuple[int, ...] | None:
        """The teacher layer of every student layer; None where one learns from several."""
        found = [[j for j, weight in enumerate(row) if weight] for row in self.weights]
        return tuple(row[0] for row in found) if all(len(row) == 1 for row in found) else None

    def restrict(self, kept: Sequence[int]) -> LayerMap:
        """The same map over some of the teacher layers only. All that are used have to be among them."""
        return LayerMap(tuple(tuple(row[j] for j in kept) for row in self.weights))

    def expand(self, kept: Sequence[int], num_teacher_layers: int) -> LayerMap:
        """What `restrict` was given: these are the teacher layers of the columns, others weigh nothing."""
        places = {layer: column for column, layer in enumerate(kept)}
        rows = ([row[places[j]] if j in places else 0.0 for j in range(num_teacher_layers)] for row in self.weights)
        return LayerMap(tuple(map(tuple, rows)))

    def apply(self, kv: Shaped[Tensor, "Lt ..."]) -> Shaped[Tensor, "Ls ..."]:
        """What every student layer learns from: KV `[Lt, 2, B, H, T, D]`, or anything else with a layer axis in front.

        Single layers are taken as they are; means are float32 at least.
        """
        assert len(kv) == self.num_teacher_layers
        if (layers := self.one_to_one) is not None:
            # A store that keeps just these layers is not copied.
            return kv if layers == tuple(range(len(kv))) else kv[list(layers)]
        used = list(self.used)
        # Under autocast a product would be rounded to its half precision.
        with torch.autocast(kv.device.type, enabled=False):
            wide = kv[used].to(torch.promote_types(kv.dtype, torch.float32))
            return torch.einsum("st,t...->s...", wide.new_tensor(self.weights)[:, used], wide)


def ratio_map(num_student_layers: int, num_teacher_layers: int) -> tuple[int, ...]:
    """Teacher layer for every student layer, at the same relative depth; the last learns from the last."""
    return tuple(
        max(0, round((layer + 1) * num_teacher_layers / num_student_layers) - 1) for layer in range(num_student_layers)
    )


def _ratio(num_student_layers: int, num_teacher_layers: int) -> LayerMap:
    """The end of each student layer's band of depth (PKD-Skip; Sun et al., 2019)."""
    return LayerMap.one_hot(ratio_map(num_student_layers, num_teacher_layers), num_teacher_layers)


def _skip(num_student_layers: int, num_teacher_layers: int) -> LayerMap:
    """The start of each band: every k-th teacher layer from the first (as in DistilBERT; Sanh et al., 2019)."""
    starts = [layer * num_teacher_layers // num_student_layers for layer in range(num_student_layers)]
    return LayerMap.one_hot(starts, num_teacher_layers)


def _uniform(num_student_layers: int, num_teacher_layers: int) -> LayerMap:
    """The mean of each band. A layer that lies in two counts in each as much as it overlaps it, so that all teacher
    layers weigh the same in total."""
    s, t = num_student_layers, num_teacher_layers
    # On a scale of s * t, student layers are t long and teacher layers s: every edge is whole.
    return LayerMap(
        tuple(tuple(max(0, min((i + 1) * t, (j + 1) * s) - max(i * t, j * s)) / t for j in range(t)) for i in range(s))
    )


def _last(num_student_layers: int, num_teacher_layers: int) -> LayerMap:
    """The last teacher layers, aligned at the end (PKD-Last; Sun et al., 2019). Of a deeper student, all layers that
    have no counterpart learn from the teacher's first."""
    offset = num_teacher_layers - num_student_layers
    return LayerMap.one_hot([max(0, layer + offset) for layer in range(num_student_layers)], num_teacher_layers)


LAYER_MAPS: dict[str, Callable[[int, int], LayerMap]] = {
    "ratio": _ratio,
    "skip": _skip,
    "uniform": _uniform,
    "last": _last,
}
"""Maps that depend on nothing but the depths."""


def layer_map(name: str, num_student_layers: int, num_teacher_layers: int) -> LayerMap:
    """The map of `LAYER_MAPS` with this name, that of a `.json` file, or that of such a file's text:
    `{"weights": [[...], ...]}`, or `{"layers": [1, 3]}` with one teacher layer each. Raises ConfigError for anything
    else, and for a map between models of other depths."""
    if (found := _document(name)) is not None:
        return _fitting(*found, num_student_layers, num_teacher_layers)
    if name not in LAYER_MAPS:
        raise _refuse("no such layer map", f"{', '.join(LAYER_MAPS)}, cka or a .json file", name)
    return LAYER_MAPS[name](num_student_layers, num_teacher_layers)


def layer_map_text(name: str) -> str:
    """A name of `layer_map` that depends on no file: of a `.json` file its text, on one line. Raises ConfigError where
    there is no such file, or no map of any depths in it."""
    if (found := _document(name)) is None:
        return name
    _require_map(*found)
    return json.dumps(found[0], separators=(",", ":"))


def cka_map(similarity: Float[Tensor, "Ls Lt"], top_k: int = 2, temperature: float = 0.1) -> LayerMap:
    """The `top_k` teacher layers most similar to each student layer, weighted by the softmax of their similarity over
    `temperature`. Of equally similar ones the earlier come first."""
    values, order = similarity.double().sort(dim=1, descending=True, stable=True)
    weights = (values[:, :top_k] / temperature).softmax(dim=1)
    rows = torch.zeros_like(values).scatter_(1, order[:, :top_k], weights)
    return LayerMap(tuple(map(tuple, rows.tolist())))


def write_layer_map(layers: LayerMap, path: Path) -> None:
    """Write a map as a JSON file that `layer_map` gives back number by number."""
    write_atomic(path, (json.dumps({"weights": layers.weights}) + "\n").encode())


def _document(name: str) -> tuple[Any, str] | None:
    """What stands in a `.json` file, or in the text of one, and what errors call it; None for other names."""
    if name.endswith(".json"):
        return _read_json(Path(name)), name
    return (_parse_json(name, "the layer map"), "the layer map") if name.startswith("{") else None


def _require_map(document: Any, where: str) -> None:
    match document:
        case {"layers": list(), **rest} | {"weights": list(), **rest} if not rest:
            return
    found = f"a table of {', '.join(document)[:60] or 'nothing'}" if isinstance(document, dict) else "other JSON"
    raise _refuse(f"{where} is no layer map", '{"weights": [[...]]} or {"layers": [...]} alone', found)


def _fitting(document: Any, where: str, num_student_layers: int, num_teacher_layers: int) -> LayerMap:
    _require_map(document, where)
    if (layers := document.get("layers")) is not None:
        wrong = [j for j in layers if type(j) is not float or j not in range(num_teacher_layers)]
        if wrong or len(layers) != num_student_layers:
            expected = f"{num_student_layers} layers from 0 to {num_teacher_layers - 1}"
            raise _refuse(f"{where} does not fit", expected, _count(layers, wrong))
        return LayerMap.one_hot([int(j) for j in layers], num_teacher_layers)
    rows = document["weights"]
    wrong = [row for row in rows if not _is_row(row, num_teacher_layers)]
    if wrong or len(rows) != num_student_layers:
        expected = f"{num_student_layers} rows of {num_teacher_layers} numbers"
        raise _refuse(f"{where} does not fit", expected, _count(rows, wrong))
    return LayerMap(tuple(map(tuple, rows)))


def _count(entries: list[Any], wrong: list[Any]) -> str:
    return f"{len(entries)}, with {str(wrong[0])[:60]}" if wrong else str(len(entries))


def _is_row(row: Any, length: int) -> bool:
    return isinstance(row, list) and len(row) == length and all(type(weight) is float for weight in row)


def _read_json(path: Path) -> Any:
    """A small JSON file, all its numbers as floats."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _refuse(f"{path} cannot be read", "a file", error.strerror) from error
    if len(data) > MAX_FILE_BYTES:
        raise _refuse(f"{path} is no layer map", f"at most {MAX_FILE_BYTES} bytes", "more")
    return _parse_json(data, str(path))


def _parse_json(data: str | bytes, where: str) -> Any:
    try:
        return json.loads(data, parse_int=float)
    except (ValueError, RecursionError) as error:
        raise _refuse(f"{where} is no layer map", "JSON", "something else") from error


def _refuse(problem: str, expected: str, found: object) -> ConfigError:
    return ConfigError(problem, expected=expected, found=found, remedy="Mend it, or name another --layer-map")
