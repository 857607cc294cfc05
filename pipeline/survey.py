"""One pass over both sides' KV, before any training: what each is like, how alike their layers are, and the moments
that maps between them are fitted to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..kvcache.align.aligner import Aligner
from ..kvcache.align.cka import CKAMatrix
from ..kvcache.align.head_projection import KVSpace
from ..kvcache.align.layer_map import LayerMap, cka_map
from ..kvcache.errors import ModelError
from ..kvcache.layout import dtype_name
from ..kvcache.store import KVStore
from .aligned_teacher import AlignedTeacher
from .distiller import KVDistiller
from .kv_statistics import KVStatistics, LayerStatistics, finite_tokens
from .map_quality import PairedMoments
from .paired_kv import PairedKV

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Side:
    """One model's KV, and what is in it. `layers` are their numbers in the model, for a teacher those of the store.
    `nonfinite` counts NaN and infinities; tokens that hold any are left out of all the rest."""

    name: str
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    dtype: str
    nonfinite: int
    statistics: tuple[LayerStatistics, ...]


@dataclass(frozen=True)
class Similarity:
    """Linear CKA `[Ls, Lt]` of every student layer with every layer of the store: of keys, of values, and the mean.
    `most_similar` names the teacher layer of each student layer that the mean picks, `layer_map` those of `cka_map`, a
    weight for every layer that the teacher has."""

    key: Matrix
    value: Matrix
    mean: Matrix
    most_similar: tuple[int, ...]
    layer_map: LayerMap


class Survey:
    """What the batches that were added say. `flat` is a distiller as training would start it.

    The teacher is seen in all layers of the store. Only for the moments are they laid onto the student's, after keys
    were rotated and tokens mixed: layer maps are linear, and so is all of that.
    """

    def __init__(self, flat: KVDistiller, store: KVStore) -> None:
        view = replace(flat.teacher.view, layer_map=LayerMap.identity(store.geometry.num_layers))
        self.distiller = KVDistiller(flat.student, [AlignedTeacher(view)])
        self.fit, self.held_out = PairedMoments(), PairedMoments()
        self._store = store
        self._layer_map = flat.teacher.view.layer_map
        assert flat.teacher.aligner is not None
        self._aligner: Aligner = flat.teacher.aligner
        self._cka = CKAMatrix()
        self._statistics = {"teacher": KVStatistics(), "student": KVStatistics()}
        self._nonfinite = {"teacher": 0, "student": 0}

    def add(self, pair: PairedKV, moments: PairedMoments) -> None:
        """Add a batch of `distiller`, to `fit` or to `held_out`."""
        mask = pair.mask
        for side, kv in (("teacher", pair.teacher), ("student", pair.student)):
            finite, count = finite_tokens(kv, pair.mask)
            mask, self._nonfinite[side] = mask * finite, self._nonfinite[side] + count
        for side, kv in (("teacher", pair.teacher), ("student", pair.student)):
            self._statistics[side].update(kv, mask)
        self._cka.update(pair.student, pair.teacher, mask)
        moments.update(pair.student, self._aligner.normalise_teacher(self._layer_map.apply(pair.teacher)), mask)

    def require_tokens(self) -> None:
        """Raise ModelError where one half has nothing to look at."""
        if not (self.fit.to_teacher.count and self.held_out.to_teacher.count):
            raise ModelError(
                "student and store have too few tokens to compare",
                expected="finite KV of the same tokens",
                found=f"{sum(self._nonfinite.values())} NaN or infinite numbers, {self.fit.to_teacher.count} tokens in "
                f"one half of the samples, {self.held_out.to_teacher.count} in the other",
                remedy="Choose another --student or --time-map, or raise --samples",
            )

    def expanded(self, layers: LayerMap) -> LayerMap:
        """A map over the layers of the store as one over all that the teacher has."""
        return layers.expand(self._store.manifest.layers, self._store.manifest.teacher.num_layers)

    def similarity(self) -> Similarity:
        """Of the layers as they are."""
        by_kind = self._cka.by_kind()
        mean = by_kind.mean(dim=0)
        key, value, both = (tuple(map(tuple, rows.tolist())) for rows in (*by_kind, mean))
        picked = tuple(self._store.manifest.layers[column] for column in mean.argmax(dim=1).tolist())
        return Similarity(key, value, both, picked, self.expanded(cka_map(mean)))

    def teacher_side(self) -> Side:
        """All layers of the store, on the student's tokens."""
        manifest = self._store.manifest
        space = self._aligner.config.teacher
        return self._side("teacher", manifest.teacher.name, manifest.layers, space, dtype_name(self._store.dtype))

    def student_side(self, name: str) -> Side:
        """The student, which does not know its own name."""
        layers = tuple(range(self._layer_map.num_student_layers))
        return self._side(
            "student", name, layers, self._aligner.config.student, dtype_name(self.distiller.student.dtype)
        )

    def _side(self, side: str, name: str, layers: tuple[int, ...], space: KVSpace, dtype: str) -> Side:
        statistics = self._statistics[side].layers(layers)
        return Side(name, layers, space.num_kv_heads, space.head_dim, dtype, self._nonfinite[side], statistics)
