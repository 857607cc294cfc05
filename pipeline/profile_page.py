"""A profile as one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from ..kvcache.files import write_atomic
from .heat_map import heat_map
from .kv_statistics import KINDS, OUTLIER_RATIO
from .map_quality import MapQuality
from .pages import render
from .profile import Profile
from .profile_advice import advice
from .step_cost import STEPS


def write_profile_page(profile: Profile, path: Path) -> None:
    """Write the page. Raises OSError where it cannot be written."""
    context = {
        "profile": profile,
        "advice": advice(profile),
        "similarity": _similarity(profile),
        "maps": [(quality, _by_kind(profile, quality)) for quality in profile.maps],
        "outlier_ratio": OUTLIER_RATIO,
        "timed_steps": STEPS,
    }
    write_atomic(path, render("profile.html.jinja", context))


def _similarity(profile: Profile) -> dict[str, str]:
    """Heat maps of the CKA; the most similar layers are framed."""
    found, stored = profile.similarity, profile.teacher.layers
    marked = [(row, stored.index(layer)) for row, layer in enumerate(found.most_similar)]
    return {
        title: heat_map(
            matrix,
            profile.student.layers,
            rows="student",
            columns="teacher layer",
            column_numbers=stored,
            marked=marked if title == "mean" else (),
        )
        for title, matrix in (("mean", found.mean), ("key", found.key), ("value", found.value))
    }


def _by_kind(profile: Profile, quality: MapQuality) -> dict[str, str]:
    """Heat maps of R2 by student layer and head of the map's output."""
    return {
        kind: heat_map(
            [layer[column] for layer in quality.r2], profile.student.layers, rows="student", columns="KV head"
        )
        for column, kind in enumerate(KINDS)
    }
