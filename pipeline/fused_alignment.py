"""From a recipe to the alignment of several stores with one student: each on its own, then how much each counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy.cluster.vq import kmeans2
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from ..kvcache.align.aligner import Aligner
from ..kvcache.align.closed_form import r2, ridge
from ..kvcache.align.fusion import (
    BestOfFusion,
    FixedFusion,
    Fusion,
    LearnedFusion,
    SimilarityFusion,
    token_rows,
)
from ..kvcache.align.normalisation import Normalisation
from ..kvcache.errors import ConfigError
from .alignment import build_distiller, gram_moments, kv_dataset, training_dataset
from .channel_moments import Moments
from .config import STRETCH_OPTIONS, DistillConfig
from .distiller import KVDistiller
from .fields import FieldError
from .fused_dataset import FusedDataset
from .matched_stores import MatchedStore
from .paired_kv import BATCH, FIT_SAMPLES, paired_kv
from .student_text import resolve_time_map
from .training_data import KVDataset

MAX_ROWS = 4096
"""Tokens that prototypes are made of: enough for a few points a layer."""


def build_fused_distiller(
    config: DistillConfig, stores: Sequence[MatchedStore], student: PreTrainedModel, train: Sequence[int]
) -> KVDistiller:
    """The student with the teachers of all stores; of one store, as `build_distiller` makes it. `train` are positions
    in the first store. Raises ConfigError or StoreError where recipe, stores and student do not fit together."""
    _require_stretch(config, stores)
    alone: list[KVDistiller] = []
    moments: Moments | None = None
    for matched in stores:
        rows = _common(matched, train)
        alone.append(build_distiller(config, matched.store, student, matched.text, rows, moments))
        # Averaged targets lie in one space: all are held against the same student.
        moments = moments or _student_moments(alone[0].teacher.aligner)
    if len(stores) == 1:
        return alone[0]
    fusion = _fusion(config, stores, alone, train)
    teachers = [distiller.teacher for distiller in alone]
    return KVDistiller(student, teachers, alone[0].terms, config.kv_weight, fusion, config.router_entropy)


def _require_stretch(config: DistillConfig, stores: Sequence[MatchedStore]) -> None:
    """Raise FieldError for options of stretching where no text is stretched."""
    maps = {resolve_time_map(config.time_map, matched.text) for matched in stores}
    if config.mode == "none" or maps & {"segment", "auto"}:
        return
    for name in STRETCH_OPTIONS:
        if not config.is_default(name):
            expected = "time_map segment and other tokens, or other texts: equal ones are not stretched"
            raise FieldError(name, expected, getattr(config, name))


def fused_dataset(config: DistillConfig, stores: Sequence[MatchedStore]) -> KVDataset | FusedDataset:
    """The batches that a recipe is evaluated on."""
    datasets = [kv_dataset(config, matched.store, matched.text, queries=False) for matched in stores]
    return _side_by_side(datasets, stores)


def fused_training_dataset(
    config: DistillConfig, stores: Sequence[MatchedStore], train: Sequence[int]
) -> KVDataset | FusedDataset:
    """The batches that a recipe learns from, each store behind its own control."""
    controls = config.kv_controls(len(stores))
    datasets = [
        training_dataset(config, matched.store, matched.text, matched.of(train), control)
        for matched, control in zip(stores, controls, strict=True)
    ]
    return _side_by_side(datasets, stores)


def _side_by_side(datasets: Sequence[KVDataset], stores: Sequence[MatchedStore]) -> KVDataset | FusedDataset:
    return datasets[0] if len(stores) == 1 else FusedDataset(datasets, stores)


def _common(matched: MatchedStore, train: Sequence[int]) -> list[int]:
    rows = matched.of(train)
    if not rows:
        raise ConfigError(
            f"{matched.store.path} has none of the first store's training samples",
            expected=f"some of {len(train)}",
            found=0,
            remedy="Extract it from the same --dataset, --samples and --seed, or raise --samples",
        )
    return rows


def _student_moments(aligner: Aligner | None) -> Moments | None:
    if aligner is None or not isinstance(aligner.normalise_student, Normalisation):
        return None
    return aligner.normalise_student.mean, aligner.normalise_student.std


def _fusion(
    config: DistillConfig, stores: Sequence[MatchedStore], alone: Sequence[KVDistiller], train: Sequence[int]
) -> Fusion:
    if config.fusion == "fixed":
        return FixedFusion(config.weights_of_stores(len(stores)))
    pairs = [
        (_aligner(distiller), distiller, kv_dataset(config, m.store, m.text, queries=False), m.of(train)[:FIT_SAMPLES])
        for distiller, m in zip(alone, stores, strict=True)
    ]
    if config.fusion == "best-of":
        return BestOfFusion(torch.stack([_held_out_r2(*pair) for pair in pairs]))
    if config.fusion == "similarity":
        prototypes = [_prototypes(*pair, config.fusion_prototypes, config.seed) for pair in pairs]
        return SimilarityFusion(prototypes, config.fusion_temperature, config.fusion_per)
    space = pairs[0][0].config.student
    layers = pairs[0][0].config.num_layers
    set_seed(config.seed)
    return LearnedFusion(len(stores), layers, layers * 2 * space.features, config.fusion_per, config.router)


def _aligner(distiller: KVDistiller) -> Aligner:
    assert distiller.teacher.aligner is not None
    return distiller.teacher.aligner.to(distiller.student.device)


def _held_out_r2(
    aligner: Aligner, distiller: KVDistiller, dataset: KVDataset, rows: Sequence[int]
) -> Float[Tensor, " L"]:
    """Of a ridge map in the aligner's direction, fitted to half of the samples, on the other half; the mean over key
    and value and all channels."""
    half = len(rows) // 2
    fit, held_out = (gram_moments(aligner, distiller, dataset, part) for part in (rows[: max(1, half)], rows[half:]))
    return r2(*ridge(fit), held_out).mean(dim=(1, 2)).float()


@torch.no_grad()
def _prototypes(
    aligner: Aligner, distiller: KVDistiller, dataset: KVDataset, rows: Sequence[int], number: int, seed: int
) -> Float[Tensor, "L P F"]:
    """The centres of so many clusters of a teacher's target, layer by layer; of one its mean."""
    # A share of every batch's tokens, so that all samples are seen and few tokens held.
    share = max(1, MAX_ROWS * BATCH // len(rows))
    found = []
    for pair in paired_kv(distiller, dataset, rows):
        _, target = aligner(pair.student, pair.teacher)
        tokens = token_rows(target)[:, pair.mask.bool()]
        found.append(tokens[:, :: max(1, -(-tokens.shape[1] // share))].double())
    tokens = torch.cat(found, dim=1)
    if number == 1:
        return tokens.mean(dim=1, keepdim=True).float()
    number = min(number, tokens.shape[1])
    centres = [kmeans2(layer.cpu().numpy(), number, minit="++", rng=seed)[0] for layer in tokens]
    return torch.stack([torch.from_numpy(points) for points in centres]).to(tokens.device).float()
