"""Experiment files: the one that ships, and what every broken one is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from kvpipe.kvcache.errors import ConfigError
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.experiment_config import load_experiment
from kvpipe.pipeline.stats import Question

GOOD = """
name = "pilot"
primary_metric = "ce"
seeds = [3, 1]

[extract]
model = "qwen"
samples = 40

[base]
epochs = 2
batch_size = 8

[arms.none]
mode = "none"

[arms.flat]
mode = "flat"
batch_size = 4

[[comparisons]]
arm = "flat"
control = "none"
"""

BASE = "[base]\nepochs = 2\nbatch_size = 8\n"
EXTRACT = '[extract]\nmodel = "qwen"\nsamples = 40\n'
COMPARISON = '[[comparisons]]\narm = "flat"\ncontrol = "none"\n'

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "pilot.toml"
        path.write_text(text)
        return path

    return write


def test_the_experiment_that_ships(root: Path) -> None:
    experiment = load_experiment(root / "experiments" / "ab.toml")
    assert experiment.name == "ab"
    assert len(experiment.seeds) >= 6
    assert {"none", "flat", "structured", "flat-shuffled"} <= set(experiment.arms)
    assert Question("structured", "flat") in experiment.comparisons
    assert experiment.extract.store == Path("stores/qwen.zarr")
    assert len({run.name for run in experiment.runs}) == len(experiment.seeds) * len(experiment.arms)
    # Alignment is the only difference between the two arms that the experiment is about.
    assert replace(experiment.arms["flat"], mode="structured") == experiment.arms["structured"]


def test_arms_are_the_base_with_their_own_fields(write: Write) -> None:
    experiment = load_experiment(write(GOOD))
    assert experiment.arms == {
        "none": DistillConfig(mode="none", epochs=2.0, batch_size=8),
        "flat": DistillConfig(mode="flat", epochs=2.0, batch_size=4),
    }
    assert experiment.extract.samples == 40
    assert experiment.comparisons == (Question("flat", "none"),)


def test_runs_go_seed_by_seed_so_that_pairs_finish_together(write: Write) -> None:
    runs = load_experiment(write(GOOD)).runs
    assert [run.name for run in runs] == ["none-seed3", "flat-seed3", "none-seed1", "flat-seed1"]
    assert [(run.recipe.mode, run.recipe.seed) for run in runs] == [("none", 3), ("flat", 3), ("none", 1), ("flat", 1)]


def test_a_file_needs_no_base_and_may_name_its_store(write: Write) -> None:
    text = GOOD.replace(BASE, "").replace("samples = 40", 'store = "here/kv.zarr"')
    experiment = load_experiment(write(text))
    assert experiment.arms["none"] == DistillConfig(mode="none")
    assert experiment.extract.store == Path("here/kv.zarr")


SMALL = '[stores.small]\ncodec = "int4"\n'


def test_arms_may_read_stores_of_their_own(write: Write) -> None:
    text = GOOD.replace(BASE, BASE + SMALL).replace('mode = "flat"', 'mode = "flat"\nstore = "small"')
    experiment = load_experiment(write(text))
    assert experiment.arms["flat"] == DistillConfig(mode="flat", epochs=2.0, batch_size=4)
    own = replace(experiment.extract, codec="int4", store=Path("stores/qwen-small.zarr"))
    assert experiment.store_of("none") == experiment.extract
    assert experiment.store_of("flat") == own
    assert experiment.extractions == [experiment.extract, own]
    assert {(run.arm, run.store) for run in experiment.runs} == {
        ("none", experiment.extract.store),
        ("flat", own.store),
    }


def test_a_store_of_its_own_is_not_at_the_place_of_the_first(write: Write) -> None:
    text = GOOD.replace(BASE, BASE + SMALL).replace("samples = 40", 'store = "here/kv.zarr"')
    assert load_experiment(write(text)).stores["small"].store == Path("stores/qwen-small.zarr")


def test_the_frontier_compares_every_store_and_two_controls_within_a_margin(root: Path) -> None:
    experiment = load_experiment(root / "experiments" / "frontier.toml")
    assert len({extraction.store for extraction in experiment.extractions}) == 11
    assert {question.margin for question in experiment.comparisons} == {0.04}
    assert {question.control for question in experiment.comparisons} == {"raw"}
    assert {question.arm for question in experiment.comparisons} == set(experiment.arms) - {"raw"}


BROKEN = {
    "a store that is not there": (
        'mode = "flat"',
        'mode = "flat"\nstore = "small"',
        "arms.flat.store: expected a table",
    ),
    "a store of another type": (BASE, BASE + "[stores]\nsmall = 3\n", "stores.small: expected a table"),
    "a store with an unknown key": (BASE, BASE + "[stores.small]\ncodecs = 3\n", "stores.small has an unknown field"),
    "stores in one place": (
        BASE,
        BASE + SMALL + 'store = "a"\n[stores.other]\nstore = "a"\n',
        "stores: expected a place of its own",
    ),
    "a store in the place of the first": (
        BASE,
        BASE + SMALL + 'store = "stores/qwen.zarr"\n',
        "stores: expected a place of its own",
    ),
    "a store that is a list": (
        'mode = "flat"',
        'mode = "flat"\nstore = ["small"]',
        "arms.flat.store: expected a table",
    ),
    "a margin that is true": (COMPARISON, COMPARISON + "margin = true\n", "expected a margin above 0, found True"),
    "a margin of nothing": (COMPARISON, COMPARISON + "margin = 0\n", "comparisons: expected a margin above 0, found 0"),
    "a margin of words": (COMPARISON, COMPARISON + "margin = 'x'\n", "comparisons: expected a margin above 0, found x"),
    "not TOML": ("[3, 1]", "[3, 1", "not TOML"),
    "unknown key": ('name = "pilot"', 'name = "pilot"\nseed = 3', "unknown key: .* found seed"),
    "missing seeds": ("seeds = [3, 1]", "", "missing key: .* found no seeds"),
    "missing comparisons": (COMPARISON, "", "missing key: .* found no comparisons"),
    "name of another type": ('name = "pilot"', "name = 3", "name: .* found 3"),
    "name that is a path": ('name = "pilot"', 'name = "../pilot"', "name: .* found '../pilot'"),
    "metric of another type": ('primary_metric = "ce"', "primary_metric = []", "primary_metric: "),
    "no seeds": ("[3, 1]", "[]", "seeds: expected a list of different whole numbers"),
    "seeds that are no list": ("[3, 1]", "3", "seeds: .* found 3"),
    "seed twice": ("[3, 1]", "[3, 3]", "seeds: "),
    "seed that is no number": ("[3, 1]", "[3, true]", "seeds: "),
    "seed below zero": ("[3, 1]", "[3, -1]", "seeds: "),
    "extract of another type": (GOOD, f"extract = 3\n{GOOD.replace(EXTRACT, '')}", "extract: expected a table"),
    "extract without a model": ('model = "qwen"\n', "", "extract: expected a model, found samples"),
    "extract with an unknown key": ("samples = 40", "sample = 40", "extract has an unknown field: .* found sample"),
    "extract with a value of another type": (
        "samples = 40",
        "samples = '40'",
        "extract: samples: expected int or NoneType",
    ),
    "model of another type": ('model = "qwen"', "model = 3", "extract: model: expected str, found 3"),
    "base of another type": (GOOD, f"base = 3\n{GOOD.replace(BASE, '')}", "base: expected a table"),
    "base with an unknown field": ("epochs = 2", "epoch = 2", "arms.none has an unknown field: .* found epoch"),
    "base with a seed": ("epochs = 2", "seed = 2", "arms.none: expected no seed"),
    "arm with a seed": ("batch_size = 4", "seed = 4", "arms.flat: expected no seed"),
    "arm with a value of another type": ("batch_size = 4", "batch_size = 4.5", "arms.flat: batch_size: expected int"),
    "arm with a value that makes no sense": ('mode = "flat"', 'mode = "round"', "arms.flat: mode: .* found 'round'"),
    "arm with a value below zero": ("batch_size = 4", "kv_weight = -1", "arms.flat: kv_weight makes no sense"),
    "arm that is no table": ("[arms.flat]", "[arms]\nround = 3\n[arms.flat]", "arms.round: expected a table, found 3"),
    "arm that is a path": ("[arms.flat]", '[arms."a/b"]', "arms: .* found 'a/b'"),
    "comparison with an unknown arm": ('control = "none"', 'control = "no"', "comparisons: .* from none, flat"),
    "comparison without a control": ('control = "none"', "", "comparisons: "),
    "comparison with itself": ('control = "none"', 'control = "flat"', "comparisons: expected a different arm"),
    "comparison with an unknown key": ('control = "none"', 'control = "none"\nalpha = 0.1', "comparisons: "),
    "comparison with a list": ('control = "none"', 'control = ["none"]', "comparisons: "),
    "comparisons of another type": (
        GOOD,
        f"comparisons = 3\n{GOOD.replace(COMPARISON, '')}",
        "comparisons: .* found 3",
    ),
    "no comparisons": (GOOD, f"comparisons = []\n{GOOD.replace(COMPARISON, '')}", "comparisons: "),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_with_its_name_and_the_key(write: Write, kind: str) -> None:
    old, new, message = BROKEN[kind]
    assert GOOD.count(old) == 1
    path = write(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        load_experiment(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no experiment file"):
        load_experiment(tmp_path / "nothing.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"name = '\xff\xfe'")
    with pytest.raises(ConfigError, match="not TOML"):
        load_experiment(binary)


def test_overrides_replace_values_of_the_file_and_are_checked_like_them(write: Write) -> None:
    path = write(GOOD)
    config = load_experiment(path, ["extract.samples=7", "base.epochs=1.5", "name=mine", "extract.dataset=my.jsonl"])
    assert (config.name, config.extract.samples, config.extract.dataset) == ("mine", 7, "my.jsonl")
    assert {recipe.epochs for recipe in config.arms.values()} == {1.5}
    for override in ("base.epoch=1", "nothing", "name.deeper=1", "extract.samples=many"):
        with pytest.raises(ConfigError, match="found"):
            load_experiment(path, [override])


def test_an_unknown_primary_metric_is_refused_before_anything_runs(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"primary_metric: expected ce or ce_auc or .*, found perplexity"):
        load_experiment(write(GOOD.replace('primary_metric = "ce"', 'primary_metric = "perplexity"')))
