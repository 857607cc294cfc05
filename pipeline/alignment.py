"""From a recipe to the alignment of one store with one student: layer map, view, projection, all before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel, set_seed

from ..data.sample import Segment, select_segments
from ..kvcache.align.aligner import Aligner, AlignerConfig
from ..kvcache.align.cka import CKAMatrix
from ..kvcache.align.closed_form import ClosedForm, GramMoments, closed_form
from ..kvcache.align.head_projection import KVSpace, LinearProjection
from ..kvcache.align.layer_map import LayerMap, cka_map
from ..kvcache.align.normalisation import Normalisation
from ..kvcache.align.parameter_match import matched_size
from ..kvcache.align.teacher_view import TeacherView
from ..kvcache.align.time_warp import segment_map
from ..kvcache.errors import ConfigError
from ..kvcache.rope import rope_of
from ..kvcache.rope_parameters import rope_parameters
from ..kvcache.store import KVStore
from .aligned_teacher import AlignedTeacher
from .channel_moments import Moments
from .compatibility import require_queries, stored_layer_map
from .config import DistillConfig
from .distiller import KVDistiller
from .kv_controls import RandomKV, ShuffledKV
from .kv_moments import stored_moments, student_moments, teacher_moments
from .loss_terms import needs_aligner, parse_kv_loss
from .paired_kv import FIT_SAMPLES, paired_kv
from .student_text import StudentText, resolve_time_map
from .training_data import KVDataset


def build_distiller(
    config: DistillConfig,
    store: KVStore,
    student: PreTrainedModel,
    text: StudentText,
    train: Sequence[int],
    student_moments: Moments | None = None,
) -> KVDistiller:
    """The student with one teacher, its view and its aligner. Shapes come from the store and from one forward of the
    student, never from flags. An aligner that normalises the student's KV takes `student_moments`, by default those of
    the compared tokens. Raises ConfigError or StoreError where recipe, store and student do not fit together.
    """
    view = build_view(config, store, student, text, train)
    terms = parse_kv_loss(config.kv_loss) if config.mode != "none" else ()
    distiller = KVDistiller(student, [AlignedTeacher(view)], terms, config.kv_weight)
    if config.reads_queries:
        require_queries(store, config.kv_loss, resolve_time_map(config.time_map, text), view.layer_map)
    if terms:
        dataset = kv_dataset(config, store, text, queries=False)
        _require_compared(config, distiller, dataset, train)
        if needs_aligner(terms):
            distiller.teacher.aligner = _aligner(config, distiller, store, dataset, train, student_moments)
    return distiller


def kv_dataset(config: DistillConfig, store: KVStore, text: StudentText, *, queries: bool = True) -> KVDataset:
    """The batches that a recipe compares KV on; evaluations need no queries."""
    segments = None
    if config.kv_segments != "all":
        segments = [Segment[name.upper()] for name in select_segments(config.kv_segments)]
    return KVDataset(
        store,
        text,
        with_kv=True,
        with_queries=queries and config.reads_queries,
        time_map=resolve_time_map(config.time_map, text),
        stretch=partial(segment_map, ratio=config.segment_ratios, interpolation=config.segment_interpolation),
        segments=segments,
    )


def training_dataset(
    config: DistillConfig, store: KVStore, text: StudentText, train: Sequence[int], control: str
) -> KVDataset:
    """The batches that a recipe learns from: those of `kv_dataset`, behind a control unless it is `none`."""
    if config.mode == "none":
        return KVDataset(store, text, with_kv=False)
    dataset = kv_dataset(config, store, text)
    if control == "shuffled":
        dataset.control = ShuffledKV(config.seed)
    elif control == "random":
        dataset.control = RandomKV(config.seed, stored_moments(dataset, train))
    return dataset


def _require_compared(config: DistillConfig, distiller: KVDistiller, dataset: KVDataset, train: Sequence[int]) -> None:
    """Raise ConfigError where a student's tokens have no counterpart in the store: nothing would be learned of it."""
    every = config.kv_segments == "all" and dataset.alignment is None
    if not every and not any(int(pair.mask.sum()) for pair in paired_kv(distiller, dataset, train[:FIT_SAMPLES])):
        raise ConfigError(
            f"no token of the first {min(FIT_SAMPLES, len(train))} samples is compared",
            expected="tokens of --kv-segments that the store keeps the KV of",
            found=f"--kv-segments {config.kv_segments}, of {', '.join(dataset.store.manifest.segments)}",
            remedy="Mend --kv-segments or --time-map, or extract again with more --segments",
        )


def build_view(
    config: DistillConfig, store: KVStore, student: PreTrainedModel, text: StudentText, train: Sequence[int]
) -> TeacherView:
    """How the student sees the teacher's KV. RoPE is asked for only where something has to be undone."""
    unrotated = config.key_space == "pre-rope"
    warped = resolve_time_map(config.time_map, text) != "identity"
    num_stored = store.geometry.num_layers
    view = TeacherView(
        layer_map=LayerMap.identity(num_stored),
        key_space=config.key_space,
        teacher_rope=rope_of(store.manifest.rope, store.geometry.head_dim) if unrotated or warped else None,
        student_rope=rope_of(rope_parameters(student), _student_space(student).head_dim) if unrotated else None,
    )
    if config.layer_map == "cka":
        similarity = layer_similarity(
            KVDistiller(student, [AlignedTeacher(view)]), kv_dataset(config, store, text), train
        )
        return replace(view, layer_map=cka_map(similarity))
    num_layers = student.config.get_text_config(decoder=True).num_hidden_layers
    return replace(view, layer_map=stored_layer_map(config.layer_map, num_layers, store))


def layer_similarity(distiller: KVDistiller, dataset: KVDataset, indices: Sequence[int]) -> torch.Tensor:
    """CKA `[Ls, L]` of the student's layers, as they are, with those of the distiller's view."""
    matrix = CKAMatrix()
    for pair in paired_kv(distiller, dataset, indices[:FIT_SAMPLES]):
        matrix.update(pair.student, pair.teacher, pair.mask)
    return matrix.value()


def _aligner(
    config: DistillConfig,
    distiller: KVDistiller,
    store: KVStore,
    dataset: KVDataset,
    train: Sequence[int],
    moments: Moments | None,
) -> Aligner:
    student, teacher = _student_space(distiller.student), KVSpace(store.geometry.num_kv_heads, store.geometry.head_dim)
    source, target = (student, teacher) if config.direction == "student-to-teacher" else (teacher, student)
    set_seed(config.seed)
    aligner = Aligner(
        AlignerConfig(
            mode=config.mode,  # type: ignore[arg-type]
            direction=config.direction,
            num_layers=distiller.teacher.view.layer_map.num_student_layers,
            student=student,
            teacher=teacher,
            share_dim_proj=config.share_dim_proj,
            share_layers=config.share_layers,
            start=config.start,
            closed_form=config.closed_form if config.fits_aligner else None,
            size=matched_size(config.mode, config.match_params, source, target, share_dim_proj=config.share_dim_proj),
        )
    )
    aligner.normalise_teacher.set_moments(*teacher_moments(distiller, dataset, train))
    if isinstance(aligner.normalise_student, Normalisation):
        aligner.normalise_student.set_moments(*(moments or student_moments(distiller, dataset, train)))
    if config.fits_aligner:
        fit_aligner(aligner.to(distiller.student.device), config.closed_form, distiller, dataset, train)
    return aligner


def fit_aligner(
    aligner: Aligner, method: ClosedForm, distiller: KVDistiller, dataset: KVDataset, indices: Sequence[int]
) -> None:
    """Start the projection from its closed form, fitted to the student as it is now."""
    moments = gram_moments(aligner, distiller, dataset, indices[:FIT_SAMPLES])
    projection = aligner.projection
    assert isinstance(projection, LinearProjection)
    if len(projection.bias) == 1:
        moments = moments.pooled()
    projection.start_from(*closed_form(method, moments))


def gram_moments(aligner: Aligner, distiller: KVDistiller, dataset: KVDataset, indices: Sequence[int]) -> GramMoments:
    """Of what an aligner maps and what it maps that to, both normalised, over the compared tokens of some samples."""
    moments = GramMoments()
    for pair in paired_kv(distiller, dataset, indices):
        sides = [aligner.normalise_student(pair.student), aligner.normalise_teacher(pair.teacher)]
        if aligner.config.direction != "student-to-teacher":
            sides.reverse()
        moments.update(sides[0], sides[1], pair.mask)
    return moments


@torch.no_grad()
def _student_space(student: PreTrainedModel) -> KVSpace:
    """Heads and channels of the student's KV as they are: head_dim is often not what the config says."""
    ids = torch.zeros((1, 2), dtype=torch.long, device=student.device)
    _, kv = KVDistiller(student, []).student_forward(ids, torch.ones_like(ids))
    return KVSpace(kv.shape[3], kv.shape[5])
