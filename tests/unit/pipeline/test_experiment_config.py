"""Experiment files: the one that ships, and what every broken one is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from kvpipe.data.errors import DataError
from kvpipe.kvcache.errors import ConfigError
from kvpipe.pipeline.claims import claims
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.experiment_config import ExperimentConfig, load_experiment
from kvpipe.pipeline.experiment_file import _key_lines
from kvpipe.pipeline.questions import Question
from kvpipe.pipeline.stats import Comparison, Verdict

GOOD = """
name = "pilot"
primary_metric = "ce"
greater_is_better = false
seeds = [3, 1]

[extract]
model = "qwen"
samples = 40

[budget]
epochs = 2

[base]
kv_weight = 2
batch_size = 8

[arms.none]
mode = "none"

[arms.flat]
mode = "flat"
learning_rate = 0.004

[[comparisons]]
arm = "flat"
control = "none"
"""

BASE = "[base]\nkv_weight = 2\nbatch_size = 8\n"
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


def answered(experiment: ExperimentConfig, verdict: Verdict) -> list[Comparison]:
    """Every question of an experiment with one and the same answer."""
    return [Comparison(q.arm, q.control, "ce", (), (), *(0.0,) * 6, verdict=verdict) for q in experiment.comparisons]


def test_every_experiment_that_ships_is_sound(root: Path) -> None:
    files = sorted((root / "experiments").glob("*.toml"))
    experiments = {file.stem: load_experiment(file) for file in files}
    assert {name: experiment.name for name, experiment in experiments.items()} == {name: name for name in experiments}
    # No seed is reported twice, and none that is reported was tuned on.
    tuned = {0, 1, 2}
    reported = [seed for name, e in experiments.items() if not name.endswith("-tuning") for seed in e.seeds]
    assert len(set(reported)) == len(reported)
    assert not tuned & set(reported)
    for name, experiment in experiments.items():
        splits = {recipe.eval_split for recipe in experiment.arms.values()}
        assert splits == {"validation" if name.endswith("-tuning") else "test"}
        assert (set(experiment.seeds) <= tuned) is name.endswith("-tuning")


def test_the_experiment_that_ships(root: Path) -> None:
    experiment = load_experiment(root / "experiments" / "ab.toml")
    assert experiment.name == "ab"
    assert len(experiment.seeds) >= 8
    assert not set(experiment.seeds) & set(experiment.tuning_seeds)
    assert experiment.comparisons[0] == Question("structured", "flat")
    assert experiment.extract.store == Path("stores/qwen.zarr")
    assert len({run.name for run in experiment.runs}) == len(experiment.seeds) * len(experiment.arms)
    # Alignment is the only difference between the two arms that the experiment is about.
    structured = replace(experiment.arms["flat"], mode="structured", match_params="flat")
    assert structured == experiment.arms["structured"]
    # One of them is compared with all of its controls.
    claim = next(claim for claim in claims(experiment, answered(experiment, "better")) if claim.arm == "flat")
    assert claim.holds
    assert list(claim.beaten) == ["no KV", "shuffled KV", "random KV"]


def test_arms_are_the_base_with_their_own_fields(write: Write) -> None:
    experiment = load_experiment(write(GOOD))
    assert experiment.arms == {
        "none": DistillConfig(mode="none", epochs=2.0, batch_size=8, kv_weight=2.0),
        "flat": DistillConfig(mode="flat", epochs=2.0, batch_size=8, kv_weight=2.0, learning_rate=0.004),
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
    assert experiment.arms["none"] == DistillConfig(mode="none", epochs=2.0)
    assert experiment.extract.store == Path("here/kv.zarr")


SMALL = '[stores.small]\ncodec = "int4"\n'


def test_arms_may_read_stores_of_their_own(write: Write) -> None:
    text = GOOD.replace(BASE, BASE + SMALL).replace('mode = "flat"', 'mode = "flat"\nstore = "small"')
    experiment = load_experiment(write(text))
    assert experiment.arms["flat"] == load_experiment(write(GOOD)).arms["flat"]
    own = replace(experiment.extract, codec="int4", store=Path("stores/qwen-small.zarr"))
    assert experiment.stores_of("none") == (experiment.extract,)
    assert experiment.stores_of("flat") == (own,)
    assert experiment.extractions == [experiment.extract, own]
    assert {(run.arm, run.stores) for run in experiment.runs} == {
        ("none", (experiment.extract.store,)),
        ("flat", (own.store,)),
    }


def test_a_list_is_what_the_command_line_has_with_commas(write: Write) -> None:
    several = 'store = ["extract", "small"]\nfusion_weights = {}\nkv_control = {}\nkv_loss = {}\n'
    words, lists = (
        load_experiment(write(GOOD.replace(BASE, BASE + SMALL).replace('mode = "flat"', 'mode = "flat"\n' + found)))
        for found in (
            several.format('"1,0.5"', '"none,shuffled"', '"mse,mercator:0.1"'),
            several.format("[1, 0.5]", '["none", "shuffled"]', '["mse", "mercator:0.1"]'),
        )
    )
    assert lists == words
    assert lists.arms["flat"].weights_of_stores(2) == [1.0, 0.5]


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
    "no samples": ("samples = 40", "samples = -4", "line 9: extract.samples: expected at least 1, found -4"),
    "a base that all arms override": ("kv_weight = 2", 'mode = "zzz"', "line 15: base.mode: .*'zzz'"),
    "a list of models": ('model = "qwen"', 'model = ["qwen", "llama"]', "extract.model: expected str, found"),
    "a list of truths": ("samples = 40", "layers = [true]", "extract.layers: expected str or list of them"),
    "a list of lists": (
        'mode = "flat"',
        'mode = "flat"\nfusion_weights = [[1], 2]',
        "arms.flat.fusion_weights: expected",
    ),
    "commas in a list": (
        'mode = "flat"',
        'mode = "flat"\nkv_control = ["none,none"]',
        "arms.flat.kv_control: expected",
    ),
    "a store that is not there": (
        'mode = "flat"',
        'mode = "flat"\nstore = "small"',
        "arms.flat.store: expected a table",
    ),
    "a store of another type": (BASE, BASE + "[stores]\nsmall = 3\n", "stores.small: expected a table"),
    "a store with an unknown key": (BASE, BASE + "[stores.small]\ncodecs = 3\n", "stores.small.codecs: no such field"),
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
    "a margin that is true": (
        COMPARISON,
        COMPARISON + "margin = true\n",
        "expected a finite number above 0, found True",
    ),
    "a margin of nothing": (
        COMPARISON,
        COMPARISON + "margin = 0\n",
        "comparisons.0.margin: .* found 0",
    ),
    "a margin of words": (
        COMPARISON,
        COMPARISON + "margin = 'x'\n",
        "comparisons.0.margin: .* found .x.",
    ),
    "not TOML": ("[3, 1]", "[3, 1", "not TOML"),
    "unknown key": ('name = "pilot"', 'name = "pilot"\nseed = 3', "line 3: seed: unknown key: .* found seed"),
    "a direction that is the metric's opposite": (
        "greater_is_better = false",
        "greater_is_better = true",
        "line 4: greater_is_better: expected false, for ce, found true",
    ),
    "a direction of another type": ("greater_is_better = false", "greater_is_better = 0", "found 0"),
    "seeds that were tuned on": ("[3, 1]", "[3, 1]\ntuning_seeds = [0, 1]", "seeds: expected none of .* found 1"),
    "tuning seeds of another type": ("[3, 1]", "[3, 1]\ntuning_seeds = 0", "tuning_seeds: expected a list"),
    "no budget": ("[budget]\nepochs = 2\n", "", "missing key: .* found no budget"),
    "a budget of two kinds": ("epochs = 2", "epochs = 2\nmax_steps = 3", "budget: expected one of epochs, max_steps"),
    "a budget of another kind": ("epochs = 2", "hours = 2", "budget.hours: no such field"),
    "a budget of nothing": ("epochs = 2", "max_steps = 0", "line 12: budget.max_steps: expected more than 0"),
    "a budget without a limit": ("epochs = 2", "max_steps = -1", "line 12: budget.max_steps: expected more than 0"),
    "a pair of other splits": (
        "learning_rate = 0.004",
        'eval_split = "validation"',
        "comparisons.0: eval_split: expected the same for flat and none, found test and validation",
    ),
    "a question asked twice": (COMPARISON, 2 * COMPARISON, "comparisons.1: expected every question once"),
    "a loss that is none": ('mode = "flat"', 'mode = "flat"\nkv_loss = "no"', "line 23: arms.flat.kv_loss: no such KV"),
    "a loss without its queries": (
        'mode = "flat"',
        'mode = "flat"\nkv_loss = "structural"',
        "line 23: arms.flat.kv_loss: expected one that needs no queries, or queries = true .* found structural",
    ),
    "a loss without its queries in one store": (
        'mode = "flat"',
        'mode = "flat"\nkv_loss = "attention-mse"\nstore = "extract"',
        "line 23: arms.flat.kv_loss: expected one that needs no queries",
    ),
    "attention by a map of several layers": (
        'mode = "flat"',
        'mode = "flat"\nkv_loss = "structural"\nlayer_map = "cka"',
        "line 24: arms.flat.layer_map: expected ratio, skip or last with --kv-loss structural",
    ),
    "a codec that is none": ("samples = 40", 'codec = "zip"', "line 9: extract.codec: expected raw, fp8, .* found zip"),
    "a store's codec that is none": (
        BASE,
        BASE + '[stores.small]\ncodec = "zip"\n',
        "stores.small.codec: expected raw",
    ),
    "a store's budget without a policy": (
        BASE,
        BASE + "[stores.small]\nbudget = 8\n",
        "stores.small.budget: expected both evict and",
    ),
    "a store of other segments": (
        BASE,
        BASE + '[stores.small]\nsegments = "end"\n',
        "stores.small.segments: .*found 'end'",
    ),
    "a layer map that is none": (
        "kv_weight = 2",
        'layer_map = \'{"layers": [1, 3], "foo": 1}\'',
        "line 15: base.layer_map: the layer map is no layer map: .* found a table of layers, foo",
    ),
    "a layer map that is not there": ("kv_weight = 2", 'layer_map = "no.json"', "line 15: base.layer_map: no.json"),
    "an arm with a budget": ("learning_rate = 0.004", "max_steps = 4", "arms.flat.max_steps: expected it in .budget"),
    "a base with a budget": ("kv_weight = 2", "epochs = 2.0", "line 15: base.epochs: expected it in .budget"),
    "an arm of other batches": ("learning_rate = 0.004", "batch_size = 4", "batch_size: .* for all arms, found 4, 8"),
    "an arm of other samples": (
        "learning_rate = 0.004",
        "samples = 4",
        "a budget in steps .* found 4, None",
    ),
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
    "extract with an unknown key": (
        "samples = 40",
        "sample = 40",
        "line 9: extract.sample: no such field",
    ),
    "extract with a value of another type": (
        "samples = 40",
        "samples = '40'",
        "line 9: extract.samples: expected int, found",
    ),
    "model of another type": ('model = "qwen"', "model = 3", "line 8: extract.model: expected str, found 3"),
    "base of another type": (GOOD, f"base = 3\n{GOOD.replace(BASE, '')}", "base: expected a table"),
    "base with an unknown field": (
        "kv_weight = 2",
        "weight = 2",
        "line 15: base.weight: no such field",
    ),
    "base with a seed": ("kv_weight = 2", "seed = 2", "seed: expected it in seeds"),
    "arm with a seed": ("learning_rate = 0.004", "seed = 4", "line 23: arms.flat.seed: expected it in seeds"),
    "arm with a value of another type": ("learning_rate = 0.004", "samples = 4.5", "arms.flat.samples: expected int"),
    "arm with a value that makes no sense": (
        'mode = "flat"',
        'mode = "round"',
        "line 22: arms.flat.mode: .*'round'",
    ),
    "arm with a value below zero": (
        "learning_rate = 0.004",
        "kv_weight = -1",
        "line 23: arms.flat.kv_weight: ",
    ),
    "arm that is no table": ("[arms.flat]", "[arms]\nround = 3\n[arms.flat]", "arms.round: expected a table, found 3"),
    "arm that is a path": ("[arms.flat]", '[arms."a/b"]', "arms: .* found 'a/b'"),
    "comparison with an unknown arm": (
        'control = "none"',
        'control = "no"',
        "comparisons.0.control: expected none or flat, found .no.",
    ),
    "comparison without a control": ('control = "none"', "", "comparisons.0: "),
    "comparison with itself": (
        'control = "none"',
        'control = "flat"',
        "comparisons.0: expected two different arms, found flat twice",
    ),
    "comparison with an unknown key": ('control = "none"', 'control = "none"\nalpha = 0.1', "comparisons.0: "),
    "comparison with a list": ('control = "none"', 'control = ["none"]', "comparisons.0.control: "),
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
    with pytest.raises((ConfigError, DataError), match=message) as caught:
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
    config = load_experiment(path, ["extract.samples=7", "budget.epochs=1.5", "name=mine", "extract.dataset=my.jsonl"])
    assert (config.name, config.extract.samples, config.extract.dataset) == ("mine", 7, "my.jsonl")
    assert {recipe.epochs for recipe in config.arms.values()} == {1.5}
    for override in (
        "base.rate=1",
        "nothing",
        "name.deeper=1",
        "name.a.b=1",
        "comparisons.0.margin=1",
        "arms.nope.mode=flat",
        "extract.samples=many",
    ):
        with pytest.raises(ConfigError, match="found"):
            load_experiment(path, [override])


def test_an_unknown_primary_metric_is_refused_before_anything_runs(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"primary_metric: expected ce or ce_auc or .*, found perplexity"):
        load_experiment(write(GOOD.replace('primary_metric = "ce"', 'primary_metric = "perplexity"')))


def test_a_budget_in_tokens_or_steps_leaves_the_samples_to_the_arms(write: Write) -> None:
    text = GOOD.replace("epochs = 2", "max_train_tokens = 700").replace("learning_rate = 0.004", "samples = 4")
    arms = load_experiment(write(text)).arms
    assert {recipe.max_train_tokens for recipe in arms.values()} == {700}
    assert [recipe.samples for recipe in arms.values()] == [None, 4]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("arms.flat.learning_rate=fast", "arms.flat.learning_rate"),
        ("seeds=[1, 1]", "seeds"),
        ("budget={epochs = 0}", "budget.epochs"),
        ("base.kv_weight=high", "base.kv_weight"),
    ],
)
def test_a_replaced_value_is_not_looked_for_in_the_file(write: Write, override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(GOOD), [override])
    assert str(caught.value).startswith(f"--set {key}: expected ")


def test_lines_are_those_of_tables_keys_and_lists_of_tables() -> None:
    text = 'a = 1\n[t]\nb = 2 # [no]\n[t."x"]\n[[c]]\narm = 1\n[[c]] # two\n  arm = 2\n[ s . u ]\n"k" = 3\n'
    assert _key_lines(text) == {
        "a": 1,
        "t": 2,
        "t.b": 3,
        "t.x": 4,
        "c": 5,
        "c.0": 5,
        "c.0.arm": 6,
        "c.1": 7,
        "c.1.arm": 8,
        "s.u": 9,
        "s.u.k": 10,
    }
