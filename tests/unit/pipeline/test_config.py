"""The options of a run: what is refused, and that flags, mappings and the command line agree."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.cli.app import app
from kvpipe.kvcache.errors import ConfigError
from kvpipe.pipeline.config import DistillConfig

POSITIVE = st.floats(1e-12, 1e12)
NOT_NEGATIVE = st.floats(0, 1e12)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)

OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "mode": st.sampled_from(["structured", "flat", "flat-global", "bottleneck"]),
    "student": WORDS,
    "random_init": st.booleans(),
    "layer_map": st.sampled_from(["ratio", "skip", "uniform", "last", "cka"]),
    "time_map": st.sampled_from(["auto", "segment"]),
    "segment_ratio": st.none() | st.sampled_from(["reasoning=0.5", "prompt=1,answer=0.25"]),
    "segment_interpolation": st.sampled_from(["linear", "nearest"]),
    "key_space": st.sampled_from(["post-rope", "pre-rope"]),
    "direction": st.sampled_from(["student-to-teacher", "teacher-to-student-joint"]),
    "share_dim_proj": st.just(True),
    "share_layers": st.just(False),
    "match_params": st.sampled_from(["none", "flat", "structured"]),
    "start": st.just("random"),
    "closed_form": st.just("ridge"),
    "kv_control": st.sampled_from(["none", "shuffled", "random", "none,shuffled"]),
    "fusion": st.just("fixed"),
    "fusion_weights": st.none() | st.sampled_from(["1,2", "0.5,0,3"]),
    "fusion_per": st.just("sample"),
    "fusion_temperature": st.just(0.1),
    "fusion_prototypes": st.just(1),
    "router": st.just("linear"),
    "router_entropy": st.just(0.0),
    "kv_loss": st.sampled_from(["mse", "smooth-l1", "mse,cka:0.1:0.2", "hybrid:2"]),
    "kv_segments": st.sampled_from(["all", "reasoning", "prompt,answer"]),
    "kv_weight": NOT_NEGATIVE,
    "learning_rate": POSITIVE,
    "aligner_learning_rate": st.none() | POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "warmup_ratio": st.floats(0, 1, exclude_max=True),
    "batch_size": st.integers(1, 10**6),
    "epochs": POSITIVE,
    "max_steps": st.just(-1) | st.integers(1, 10**9),
    "max_train_tokens": st.none(),
    "samples": st.none() | st.integers(1, 10**9),
    "eval_split": WORDS,
    "max_new_tokens": st.integers(1, 10**6),
    "on_collapse": st.sampled_from(["stop", "warn"]),
    "bf16": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
}

GIVEN_OPTIONS = st.fixed_dictionaries({}, optional=OPTIONS)


def parse(flags: list[str]) -> DistillConfig:
    """What `kvpipe distill` would run with these flags."""
    command = typer.main.get_command(app).commands["distill"]
    parameters = command.make_context("distill", list(flags)).params
    options = {field.name: parameters[field.name] for field in fields(DistillConfig)}
    return DistillConfig.from_mapping(options, "the command line: {}".format)


def test_the_strategy_knows_every_option() -> None:
    assert list(OPTIONS) == [field.name for field in fields(DistillConfig)]


def test_no_flags_are_the_defaults() -> None:
    assert DistillConfig().flags() == []
    assert parse([]) == DistillConfig()


@given(GIVEN_OPTIONS)
def test_flags_bring_the_config_back_through_the_command_line(options: dict[str, Any]) -> None:
    config = DistillConfig(**options)
    assert parse(config.flags()) == config


@given(st.sampled_from([{}, {"seed": 3}, {"samples": 5, "epochs": 0.5}]))
def test_the_control_without_kv_comes_back_too(options: dict[str, Any]) -> None:
    config = DistillConfig(mode="none", **options)
    assert parse(config.flags()) == config


RECIPES = [
    {"mode": "structured", "start": "uniform", "share_layers": True},
    {"mode": "structured", "share_dim_proj": False, "match_params": "flat"},
    {"mode": "structured", "start": "closed-form", "closed_form": "procrustes"},
    {"mode": "flat", "direction": "teacher-to-student-frozen", "closed_form": "pca"},
    {"mode": "identity", "kv_loss": "relation"},
    {"mode": "identity", "key_space": "pre-rope"},
    {"fusion": "similarity", "fusion_prototypes": 8, "fusion_temperature": 0.5, "fusion_per": "token"},
    {"fusion": "learned", "router": "mlp", "router_entropy": -0.1},
    {"fusion": "best-of"},
]


@pytest.mark.parametrize("options", RECIPES)
def test_recipes_whose_options_depend_on_each_other_come_back(options: dict[str, Any]) -> None:
    config = DistillConfig(**options)
    assert parse(config.flags()) == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "flat", "kv_loss": "relation"}, "^mode: expected identity with --kv-loss relation"),
        ({"kv_control": "none,noise"}, "^kv_control: expected none, shuffled, random, or one of them for each store"),
        ({"fusion_weights": "1,-1"}, "^fusion_weights: expected numbers of 0 or more with a positive sum"),
        ({"fusion_weights": "1,nan"}, "^fusion_weights: expected numbers of 0 or more with a positive sum"),
        ({"fusion": "best-of", "fusion_weights": "1,2"}, "^fusion_weights: expected it with --fusion fixed alone"),
        (
            {"mode": "flat", "fusion": "similarity", "direction": "teacher-to-student-joint"},
            "^fusion: expected another with direction teacher-to-student-joint",
        ),
        ({"fusion_temperature": 2.0}, "^fusion_temperature: expected it with --fusion similarity alone"),
        ({"fusion": "similarity", "fusion_prototypes": 0}, "^fusion_prototypes: expected at least 1, found 0"),
        ({"fusion": "learned", "fusion_per": "layer", "router": "mlp"}, "^router: expected linear with fusion_per"),
        ({"mode": "flat", "start": "uniform"}, "^start: expected mode structured with uniform"),
        ({"mode": "flat", "share_layers": True}, "^share_layers: expected mode structured"),
        ({"mode": "flat", "share_dim_proj": False}, "^mode: expected structured with --per-head-proj"),
        ({"mode": "identity", "match_params": "flat"}, "^match_params: expected none with mode identity"),
        (
            {"closed_form": "procrustes"},
            "^closed_form: expected start closed-form, or direction teacher-to-student-frozen",
        ),
        ({"mode": "bottleneck", "start": "closed-form"}, "^mode: expected structured, flat or flat-glob"),
        ({"mode": "bottleneck", "direction": "teacher-to-student-frozen"}, "^mode: expected"),
        ({"mode": "identity", "direction": "teacher-to-student-joint"}, "^direction: expected"),
        ({"start": "closed-form", "closed_form": "pca"}, "^closed_form: expected ridge or procrustes"),
        ({"kv_segments": "question"}, "^kv_segments: expected all, or some of prompt, reasoning, answer"),
        ({"kv_loss": "mae"}, "mae"),
        ({"layer_map": "cka", "kv_loss": "structural"}, "^layer_map: expected ratio, skip or last"),
        ({"start": "uniform", "direction": "teacher-to-student-frozen"}, "^start: expected random or closed-form"),
        ({"segment_ratio": "reasoning=0.5", "time_map": "span-last"}, "^segment_ratio: expected it with time_map seg"),
        ({"segment_interpolation": "nearest", "time_map": "identity"}, "^segment_interpolation: expected it with"),
        *(
            ({"segment_ratio": text, "time_map": "segment"}, "^segment_ratio: expected (prompt|shares above 0)")
            for text in ("reasoning", "reasoning=", "padding=1", "all=1", "x=1", "answer=0", "answer=1.5", "answer=nan")
        ),
        ({"segment_ratio": "answer=0.5,answer=0.2", "time_map": "segment"}, "^segment_ratio: expected one share a seg"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DistillConfig(**options)


@given(GIVEN_OPTIONS)
def test_a_mapping_brings_the_config_back_through_json(options: dict[str, Any]) -> None:
    config = DistillConfig(**options)
    assert DistillConfig.from_mapping(json.loads(json.dumps(config.to_dict())), "a file: {}".format) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("learning_rate", "epochs") for value in (0.0, -1.0, math.nan, math.inf)),
        *((name, value) for name in ("batch_size", "max_new_tokens", "samples") for value in (0, -3)),
        *((name, value) for name in ("kv_weight", "weight_decay") for value in (-0.1, math.nan, math.inf)),
        *(("aligner_learning_rate", value) for value in (0.0, -1e-3, math.nan, math.inf)),
        *(("warmup_ratio", value) for value in (-0.1, 1.0, 20.0, math.nan)),
        *(("max_steps", value) for value in (0, -2)),
        *(("seed", value) for value in (-1, 2**32)),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected .* Mend {name} \(--{name.replace('_', '-')}\)$"):
        DistillConfig(**{name: value})
    with pytest.raises(ConfigError, match=rf"^runs.toml: {name}: expected"):
        DistillConfig.from_mapping({name: value}, "runs.toml: {}".format)


def test_a_shuffled_control_needs_kv_to_shuffle() -> None:
    with pytest.raises(ConfigError, match=r"^kv_control: expected"):
        DistillConfig(mode="none", kv_control="shuffled")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("mode", 3, "structured or flat or flat-global or bottleneck or identity or none"),
        ("mode", "both", "structured or flat or flat-global or bottleneck or identity or none"),
        ("direction", "", "student-to-teacher or teacher-to-student-frozen or teacher-to-student-joint"),
        ("on_collapse", "ignore", "stop or warn"),
        ("student", None, "str"),
        ("random_init", 1, "bool"),
        ("bf16", "true", "bool"),
        ("learning_rate", "1e-3", "float"),
        ("learning_rate", True, "float"),
        ("epochs", None, "float"),
        ("batch_size", 2.0, "int"),
        ("batch_size", True, "int"),
        ("seed", "0", "int"),
        ("samples", 1.5, "int"),
        ("samples", False, "int"),
        ("aligner_learning_rate", "auto", "float"),
        ("on_collapse", [], "stop or warn"),
    ],
)
def test_a_value_of_another_type_or_word_is_refused_by_name(name: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DistillConfig.from_mapping({name: value}, "runs.toml: {}".format)
    assert str(caught.value).startswith(f"runs.toml: {name}: expected {expected}, found {value!r}")


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"^runs.toml: leaning_rate: no such field: .*mode, student.* found leaning_rate"
    ):
        DistillConfig.from_mapping({"leaning_rate": 1e-3}, "runs.toml: {}".format)


def test_a_whole_number_will_do_for_a_float() -> None:
    assert DistillConfig.from_mapping({"epochs": 4, "kv_weight": 0}, "runs.toml: {}".format) == DistillConfig(
        epochs=4.0, kv_weight=0.0
    )


def test_the_aligner_learns_five_times_as_fast_unless_told() -> None:
    assert DistillConfig(learning_rate=1e-3).aligner_lr == pytest.approx(5e-3)
    assert DistillConfig(learning_rate=1e-3, aligner_learning_rate=7e-4).aligner_lr == 7e-4


def test_a_runs_name_tells_its_mode_fusion_control_and_seed() -> None:
    assert DistillConfig(seed=4).name() == "structured-seed4"
    assert DistillConfig(mode="flat", kv_control="shuffled").name() == "flat-shuffled-seed0"
    assert DistillConfig(kv_control="none,shuffled").name(2) == "structured-fixed-none+shuffled-seed0"
    assert DistillConfig(fusion="best-of").name(3) == "structured-best-of-seed0"


def test_the_command_line_has_an_option_for_every_field_with_the_same_default() -> None:
    command = typer.main.get_command(app).commands["distill"]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    assert {field.name: defaults[field.name] for field in fields(DistillConfig)} == DistillConfig().to_dict()


def test_an_extractions_flags_give_it_back() -> None:
    from kvpipe.cli.extract_options import extract_config
    from kvpipe.pipeline.extract_config import ExtractConfig

    kept = {"layers": "ratio:2", "codec": "int4", "evict": "rkv", "budget": 0.5}
    config = ExtractConfig("qwen", Path("x.zarr"), samples=40, max_shard_bytes=10**6, **kept)
    flags = config.flags()
    options = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    assert options.pop("store") == "x.zarr"
    assert options.pop("samples") == "40"
    found = extract_config(store=Path("x.zarr"), batch_size="auto", samples=40, **options)
    assert found == config
