"""What a store and a student have in common before any training: which layers, how much of it by which map, at what
cost. The teacher is never loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import Progress
from transformers import PreTrainedModel

from ..kvcache.align.aligner import Aligner
from ..kvcache.align.layer_map import LayerMap
from ..kvcache.errors import ConfigError
from ..kvcache.store import KVStore
from .aligned_teacher import AlignedTeacher
from .alignment import build_distiller, build_view, kv_dataset
from .compatibility import require_learnable, require_positions, student_text
from .config import DistillConfig
from .distiller import KVDistiller
from .map_quality import MapQuality, StartLoss, compare_maps, start_loss
from .models import load_student, resolve_device, starts_random, tokenizer_from_files
from .paired_kv import BATCH, paired_kv
from .progress import progress_bar
from .step_cost import STEPS, StepCost, measure_steps
from .student_text import StudentText
from .survey import Side, Similarity, Survey
from .training_data import KVDataset

PROFILED = (
    "student",
    "random_init",
    "layer_map",
    "time_map",
    "segment_ratio",
    "segment_interpolation",
    "key_space",
    "kv_segments",
    "seed",
)
"""What a profile looks at of a recipe: all that is settled before a map is chosen."""


@dataclass(frozen=True)
class Profile:
    """Maps and losses are for `layer_map`, over all the teacher's layers, and fitted to the first half of the samples;
    R2 and losses are of the other half's `held_out_tokens`."""

    store: str
    samples: int
    tokens: int
    held_out_tokens: int
    excluded_samples: int
    random_student: bool
    token_coverage: float
    one_to_one_share: float
    teacher: Side
    student: Side
    similarity: Similarity
    layer_map: LayerMap
    maps: tuple[MapQuality, ...]
    start_loss: dict[str, StartLoss]
    steps: dict[str, StepCost]
    device: str

    def map_named(self, name: str) -> MapQuality:
        """One of `maps`."""
        return next(quality for quality in self.maps if quality.name == name)


def profile(
    config: DistillConfig, store_path: Path, *, samples: int, device: str = "auto", progress: Progress | None = None
) -> Profile:
    """Look at the first `samples` training samples of a store with the student of a recipe, of which PROFILED counts.
    Raises ConfigError, ModelError or StoreError for what the user can mend."""
    resolved = resolve_device(device)
    store = KVStore.open(store_path)
    store.require_complete()
    tokenizer = tokenizer_from_files(store.tokenizer_files())
    student = load_student(config.student, tokenizer, random_init=config.random_init, seed=config.seed).to(resolved)
    text, _ = student_text(config, store, student)
    require_positions(student, store, text)
    return profile_student(config, store, student, text, samples=samples, progress=progress)


def profile_student(
    config: DistillConfig,
    store: KVStore,
    student: PreTrainedModel,
    text: StudentText,
    *,
    samples: int,
    progress: Progress | None = None,
) -> Profile:
    """The same for a student that is loaded, on its device."""
    chosen = _sample(store, samples)
    fit, held_out = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    # Before there is a bar: here is what a user can have got wrong.
    distillers = _distillers(config, store, student, text, fit)
    dataset = kv_dataset(config, store, text)
    survey = Survey(distillers["flat"], store)
    with progress or progress_bar() as bar:
        passes = sum(-(-len(half) // BATCH) for half in (fit, held_out))
        task = bar.add_task("profile", total=passes + len(distillers) * (STEPS + 1), status="reading")
        for half, moments in ((fit, survey.fit), (held_out, survey.held_out)):
            for pair in paired_kv(survey.distiller, dataset, half):
                survey.add(pair, moments)
                bar.advance(task)
        survey.require_tokens()
        bar.update(task, status="timing steps")
        steps = _steps(distillers, dataset, chosen, lambda: bar.advance(task))
        bar.update(task, status="fitting maps")
        found = _summary(config, survey, distillers, dataset, chosen, steps)
        bar.update(task, status="")
    return found


def _summary(
    config: DistillConfig,
    survey: Survey,
    distillers: dict[str, KVDistiller],
    dataset: KVDataset,
    chosen: list[int],
    steps: dict[str, StepCost],
) -> Profile:
    store, flat, covered = dataset.store, distillers["flat"], dataset.coverage(chosen)
    aligners = {mode: _aligner(distillers[mode]) for mode in ("flat", "structured")}
    return Profile(
        store=str(store.path),
        samples=len(chosen),
        tokens=survey.fit.to_teacher.count + survey.held_out.to_teacher.count,
        held_out_tokens=survey.held_out.to_teacher.count,
        excluded_samples=len(store.excluded),
        random_student=starts_random(config.student, config.random_init),
        token_coverage=covered.share,
        one_to_one_share=covered.one_to_one_share,
        teacher=survey.teacher_side(),
        student=survey.student_side(config.student),
        similarity=survey.similarity(),
        layer_map=survey.expanded(flat.teacher.view.layer_map),
        maps=compare_maps(aligners["flat"], survey.fit, survey.held_out),
        start_loss={mode: start_loss(each, survey.fit, survey.held_out) for mode, each in aligners.items()},
        steps=steps,
        device=str(flat.student.device),
    )


def _sample(store: KVStore, samples: int) -> list[int]:
    """The first training samples, as for whatever else is computed before training."""
    chosen: list[int] = store.indices("train")[: max(samples, 0)].tolist()
    if len(chosen) < 2:
        raise ConfigError(
            "too few training samples for a profile",
            expected="at least 2, one to fit maps to and one to hold out",
            found=min(samples, len(chosen)),
            remedy="Raise --samples, or extract more",
        )
    require_learnable(store, "train", chosen)
    return chosen


def _distillers(
    config: DistillConfig, store: KVStore, student: PreTrainedModel, text: StudentText, fit: list[int]
) -> dict[str, KVDistiller]:
    """As training would start them. The student is the same in all."""
    config = DistillConfig(mode="flat", **{name: getattr(config, name) for name in PROFILED})
    view = build_view(config, store, student, text, fit)
    # By its numbers, so that a map that has to be found is found once.
    whole = view.layer_map.expand(store.manifest.layers, store.manifest.teacher.num_layers)
    config = replace(config, layer_map=json.dumps({"weights": whole.weights}))
    found = {"none": KVDistiller(student, [AlignedTeacher(view)])}
    for mode in ("flat", "structured"):
        found[mode] = build_distiller(replace(config, mode=mode), store, student, text, fit).to(student.device)
    return found


def _aligner(distiller: KVDistiller) -> Aligner:
    assert distiller.teacher.aligner is not None
    return distiller.teacher.aligner


def _steps(
    distillers: dict[str, KVDistiller], dataset: KVDataset, chosen: list[int], done: Callable[[], None]
) -> dict[str, StepCost]:
    text_only = KVDataset(dataset.store, dataset.text, with_kv=False)
    return {
        mode: measure_steps(distiller, text_only if mode == "none" else dataset, chosen, done)
        for mode, distiller in distillers.items()
    }
