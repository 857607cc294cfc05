"""The options of a distillation run, as the command line, an experiment file and `run.json` all know them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_type_hints

from ..data.errors import DataError
from ..data.sample import Segment, select_segments
from ..kvcache.align.aligner import Direction, Mode
from ..kvcache.align.closed_form import ClosedForm
from ..kvcache.align.fusion import FusionName, Granularity, Router
from ..kvcache.align.head_projection import Start
from ..kvcache.align.layer_map import layer_map_text
from ..kvcache.align.parameter_match import Match
from ..kvcache.align.teacher_view import KeySpace
from ..kvcache.align.time_warp import Interpolation
from .extract_config import MAX_SEED
from .fields import FieldError, Where, flags, parse_fields, placed
from .kv_controls import KVControlName
from .loss_terms import POINTWISE, needs_aligner, needs_queries, parse_kv_loss, weighs_tokens

DistillMode = Literal[Mode, "none"]
TimeMapping = Literal["auto", "identity", "span-last", "span-mean", "segment"]
OnCollapse = Literal["stop", "warn"]

FINITE = (
    "kv_weight",
    "learning_rate",
    "aligner_learning_rate",
    "weight_decay",
    "epochs",
    "fusion_temperature",
    "router_entropy",
)

SEGMENTS = {segment.name.lower(): int(segment) for segment in Segment if segment != Segment.PADDING}
"""By name, those that text can be in."""

STRETCH_OPTIONS = ("segment_ratio", "segment_interpolation")
"""Of time maps that stretch segments."""

FUSION_OPTIONS = {
    "fusion_weights": ("fixed",),
    "fusion_per": ("similarity", "learned"),
    "fusion_temperature": ("similarity",),
    "fusion_prototypes": ("similarity",),
    "router": ("learned",),
    "router_entropy": ("learned",),
}
"""The fusions that look at an option."""


@dataclass(frozen=True)
class DistillConfig:
    """One recipe. Two runs with equal configs and the same stores are the same run."""

    mode: DistillMode = "structured"
    student: str = "tiny"
    random_init: bool = False
    layer_map: str = "ratio"
    time_map: TimeMapping = "auto"
    segment_ratio: str | None = None
    segment_interpolation: Interpolation = "linear"
    key_space: KeySpace = "post-rope"
    direction: Direction = "student-to-teacher"
    share_dim_proj: bool = True
    share_layers: bool = False
    match_params: Match = "none"
    start: Start = "random"
    closed_form: ClosedForm = "ridge"
    kv_control: str = "none"
    fusion: FusionName = "fixed"
    fusion_weights: str | None = None
    fusion_per: Granularity = "sample"
    fusion_temperature: float = 0.1
    fusion_prototypes: int = 1
    router: Router = "linear"
    router_entropy: float = 0.0
    kv_loss: str = "mse"
    kv_segments: str = "all"
    kv_weight: float = 1.0
    learning_rate: float = 1e-3
    aligner_learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup_ratio: float = 0.05
    batch_size: int = 16
    epochs: float = 3.0
    max_steps: int = -1
    max_train_tokens: int | None = None
    samples: int | None = None
    eval_split: str = "test"
    max_new_tokens: int = 64
    on_collapse: OnCollapse = "stop"
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in FINITE:
            if not math.isfinite(getattr(self, name) or 0):
                raise FieldError(name, "a finite number", getattr(self, name))
        for name in ("learning_rate", "batch_size", "epochs", "max_new_tokens", "fusion_temperature"):
            if not getattr(self, name) > 0:
                raise FieldError(name, "more than 0", getattr(self, name))
        if self.aligner_learning_rate is not None and not self.aligner_learning_rate > 0:
            raise FieldError("aligner_learning_rate", "more than 0", self.aligner_learning_rate)
        for name in ("samples", "max_train_tokens", "fusion_prototypes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise FieldError(name, "at least 1", getattr(self, name))
        if self.max_steps == 0 or self.max_steps < -1:
            raise FieldError("max_steps", "at least 1, or -1 for no limit", self.max_steps)
        if self.max_train_tokens is not None and self.max_steps != -1:
            raise FieldError("max_train_tokens", "none where max_steps is given", self.max_train_tokens)
        for name in ("kv_weight", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise FieldError(name, "0 or more", getattr(self, name))
        if not 0 <= self.warmup_ratio < 1:
            raise FieldError("warmup_ratio", "0 or more, and less than 1", self.warmup_ratio)
        if self.eval_split == "train":
            raise FieldError("eval_split", "a held-out split", "train")
        if not 0 <= self.seed < MAX_SEED:
            raise FieldError("seed", "0 or more, and less than 2**32", self.seed)
        self._require_recipe()
        self._require_fusion()

    def _require_recipe(self) -> None:
        """Raise ConfigError for alignment options that do not go together."""
        terms = parse_kv_loss(self.kv_loss)
        if unknown := set(self.kv_control.split(",")) - set(get_args(KVControlName)):
            expected = f"{', '.join(get_args(KVControlName))}, or one of them for each store"
            raise FieldError("kv_control", expected, repr(sorted(unknown)[0]))
        if self.mode == "none" and self.kv_control != "none":
            raise FieldError("kv_control", "none with mode none, which uses no KV", self.kv_control)
        try:
            select_segments(self.kv_segments)
        except DataError as error:
            raise FieldError("kv_segments", "all, or some of prompt, reasoning, answer", self.kv_segments) from error
        self._require_stretch()
        if self.mode not in ("none", "identity") and not needs_aligner(terms):
            raise FieldError("mode", f"identity with --kv-loss {self.kv_loss}, which projects nothing", self.mode)
        if self.key_space == "pre-rope" and needs_queries(terms):
            raise FieldError(
                "key_space", f"post-rope with --kv-loss {self.kv_loss}, as attention has it", self.key_space
            )
        if self.layer_map == "cka" and self.reads_queries:
            expected = f"ratio, skip or last with --kv-loss {self.kv_loss}, which compares attention layer by layer"
            raise FieldError("layer_map", expected, self.layer_map)
        self._require_projection()

    def _require_projection(self) -> None:
        """Raise FieldError for options of a projection that do not go together."""
        if self.start == "uniform" and self.direction == "teacher-to-student-frozen":
            raise FieldError("start", "random or closed-form with a frozen direction, which is fitted", self.start)
        if self.mode == "identity" and self.direction != "student-to-teacher":
            raise FieldError("direction", "student-to-teacher with mode identity, which maps nothing", self.direction)
        if self.share_layers and self.mode != "structured":
            raise FieldError("share_layers", "mode structured (flat-global is flat, shared by all layers)", self.mode)
        if self.start == "uniform" and self.mode != "structured":
            raise FieldError("start", "mode structured with uniform, the mean of the heads", self.mode)
        if not self.share_dim_proj and self.mode != "structured":
            raise FieldError("mode", "structured with --per-head-proj, a map for every head", self.mode)
        if self.match_params != "none" and self.mode == "identity":
            raise FieldError("match_params", "none with mode identity, which has no weights", self.match_params)
        if self.closed_form != "ridge" and not self.fits_aligner:
            expected = "start closed-form, or direction teacher-to-student-frozen: else nothing is fitted"
            raise FieldError("closed_form", expected, self.closed_form)
        if self.fits_aligner and self.mode in ("bottleneck", "identity"):
            raise FieldError("mode", "structured, flat or flat-global, which have a closed form", self.mode)
        if self.start == "closed-form" and self.closed_form == "pca" and self.direction == "student-to-teacher":
            raise FieldError("closed_form", "ridge or procrustes: pca knows the teacher alone", self.closed_form)

    def _require_stretch(self) -> None:
        """Raise ConfigError for options of a time map that stretches nothing."""
        for name in STRETCH_OPTIONS:
            if not self.is_default(name) and self.time_map not in ("segment", "auto"):
                raise FieldError(name, "it with time_map segment alone", getattr(self, name))
        if not all(0 < share <= 1 for share in self.segment_ratios.values()):
            raise FieldError("segment_ratio", "shares above 0, 1 at most", repr(self.segment_ratio))

    @property
    def segment_ratios(self) -> dict[int, float]:
        """`segment_ratio` by the segment's id. Raises FieldError for text that is no such thing."""
        try:
            pairs = [item.split("=") for item in (self.segment_ratio or "").split(",") if item]
            shares = {SEGMENTS[name.strip()]: float(share) for name, share in pairs}
        except (KeyError, ValueError) as error:
            expected = f"{', '.join(SEGMENTS)} with a share, as in reasoning=0.5"
            raise FieldError("segment_ratio", expected, repr(self.segment_ratio)) from error
        if len(shares) < len(pairs):
            raise FieldError("segment_ratio", "one share a segment", repr(self.segment_ratio))
        return shares

    def _require_fusion(self) -> None:
        """Raise ConfigError for options of a fusion that is another one."""
        for name, fusions in FUSION_OPTIONS.items():
            if not self.is_default(name) and self.fusion not in fusions:
                raise FieldError(name, f"it with --fusion {' or '.join(fusions)} alone", getattr(self, name))
        if self.mode == "none" and (self.fusion != "fixed" or self.fusion_weights is not None):
            raise FieldError("mode", "one that uses KV with a fusion", self.mode)
        if self.fusion == "similarity" and self.direction == "teacher-to-student-joint":
            raise FieldError(
                "fusion", "another with direction teacher-to-student-joint, whose target moves", self.fusion
            )
        if self.router != "linear" and self.fusion_per == "layer":
            raise FieldError("router", "linear with fusion_per layer, which looks at nothing", self.router)
        weights = self._fusion_weights
        if weights is not None and not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
            raise FieldError("fusion_weights", "numbers of 0 or more with a positive sum", self.fusion_weights)

    def is_default(self, name: str) -> bool:
        """Whether an option is what it is where nobody says anything."""
        return bool(getattr(self, name) == type(self).__dataclass_fields__[name].default)

    @property
    def routes(self) -> bool:
        """Whether the weights of several teachers depend on anything that is seen in training."""
        return self.fusion in ("similarity", "learned")

    def require_fusion(self, num_stores: int) -> None:
        """Raise FieldError for options that do not fit so many stores."""
        self.kv_controls(num_stores)
        if num_stores == 1:
            for name in ("fusion", "fusion_weights"):
                if not self.is_default(name):
                    raise FieldError(name, "several stores (--store A --store B) with it", getattr(self, name))
            return
        self.weights_of_stores(num_stores)
        if self.mode != "none" and not weighs_tokens(parse_kv_loss(self.kv_loss)):
            raise FieldError("kv_loss", f"only {', '.join(POINTWISE)} with several stores", self.kv_loss)

    def weights_of_stores(self, num_stores: int) -> list[float]:
        """`fusion_weights` as numbers, one for each of so many stores. Raises FieldError where it has others."""
        weights = self._fusion_weights or [1.0] * num_stores
        if len(weights) != num_stores:
            raise FieldError("fusion_weights", f"{num_stores} numbers, one a store", self.fusion_weights)
        return weights

    @property
    def _fusion_weights(self) -> list[float] | None:
        if self.fusion_weights is None:
            return None
        try:
            return [float(weight) for weight in self.fusion_weights.split(",")]
        except ValueError as error:
            raise FieldError("fusion_weights", "numbers with commas, one a store", repr(self.fusion_weights)) from error

    def kv_controls(self, num_stores: int) -> list[str]:
        """`kv_control` of each of so many stores. Raises FieldError where it names others."""
        controls = self.kv_control.split(",")
        if len(controls) == 1:
            return controls * num_stores
        if len(controls) != num_stores:
            raise FieldError("kv_control", f"one word, or {num_stores}: one a store", self.kv_control)
        return controls

    @property
    def reads_queries(self) -> bool:
        """Whether its loss compares attention, and so needs the teacher's queries."""
        return self.mode != "none" and needs_queries(parse_kv_loss(self.kv_loss))

    @property
    def fits_aligner(self) -> bool:
        """Whether the projection starts, or stays, as its closed form."""
        return self.start == "closed-form" or self.direction == "teacher-to-student-frozen"

    @property
    def aligner_lr(self) -> float:
        """Five times the student's unless given: an aligner that lags behind pulls the student to its own noise."""
        return self.aligner_learning_rate or 5 * self.learning_rate

    def name(self, num_stores: int = 1) -> str:
        """The run's name unless the user gives one."""
        fusion = "" if num_stores == 1 else f"-{self.fusion}"
        control = "" if self.kv_control == "none" else f"-{self.kv_control.replace(',', '+')}"
        return f"{self.mode}{fusion}{control}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def flags(self) -> list[str]:
        """The options of `kvpipe distill` that give this config; defaults are left out."""
        return flags(self, share_dim_proj=lambda _: ["--per-head-proj"])

    @classmethod
    def from_mapping(cls, document: Mapping[str, Any], where: Where) -> DistillConfig:
        """A config from TOML, JSON or the command line. Raises ConfigError saying where the field is that is wrong."""
        options = parse_fields(document, get_type_hints(cls), where)
        if "layer_map" in options:
            # A run is what its config says: it must not change with a file.
            with placed(where, "layer_map"):
                options["layer_map"] = layer_map_text(options["layer_map"])
        # Every other field says its own name: FieldError.
        with placed(where, "kv_loss"):
            return cls(**options)
