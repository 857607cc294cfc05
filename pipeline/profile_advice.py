"""What a profile comes down to, in sentences."""

from __future__ import annotations

from .kv_statistics import LayerStatistics
from .map_quality import MAPS
from .profile import Profile

TIE = 0.01
"""R2 of two kinds of map that differ by less are called equal: another sample could turn them round."""

CAVEAT = (
    "Structured maps are those nearest to the flat one, not the best of their kind. And R2 before training need not "
    "predict the trained student: training moves the student as well as the map."
)


def advice(profile: Profile) -> list[str]:
    """The suggested layer map, and which kind of map has the higher held-out R2, with what speaks against trusting
    them."""
    sentences = [_layers(profile), _kinds(profile), CAVEAT]
    if profile.random_student:
        sentences.append(
            "The student starts at random: its similarity and its R2 are those of random features, "
            "and need not be those of the layers that it will have."
        )
    if outlying := [statistics for statistics in profile.teacher.statistics if statistics.outliers]:
        count = sum(len(statistics.outliers) for statistics in outlying)
        sentences.append(f"The teacher has {count} outlier channels, in {_places(outlying)}.")
    return sentences


def _layers(profile: Profile) -> str:
    found = profile.similarity
    pairs = [
        f"{layer} from {picked} ({max(row):.2f})"
        for layer, picked, row in zip(profile.student.layers, found.most_similar, found.mean, strict=True)
    ]
    return f"Most similar layers, by CKA: student layer {', '.join(pairs)}."


def _kinds(profile: Profile) -> str:
    flat, structured, structured_large, flat_small = (profile.map_named(name).mean for name in MAPS)
    return (
        f"Held-out R2: {_compared(flat, structured)}. At flat's size, {_compared(flat, structured_large)}; "
        f"at structured's size, {_compared(flat_small, structured)}."
    )


def _compared(flat: float, structured: float) -> str:
    if abs(flat - structured) < TIE:
        return f"flat and structured are alike ({flat:.2f} and {structured:.2f})"
    if flat > structured:
        return f"flat is higher than structured ({flat:.2f} against {structured:.2f})"
    return f"structured is higher than flat ({structured:.2f} against {flat:.2f})"


def _places(outlying: list[LayerStatistics]) -> str:
    return ", ".join(f"the {statistics.kind}s of layer {statistics.layer}" for statistics in outlying)
