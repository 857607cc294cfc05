"""That KV helps is claimed of an arm that beats all of its controls, and of no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from kvpipe.pipeline.claims import Claim, claims
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.questions import Question
from kvpipe.pipeline.report import claim_sentence
from kvpipe.pipeline.results import collect

RECIPES = {
    "none": DistillConfig(mode="none"),
    "flat": DistillConfig(mode="flat"),
    "shuffled": DistillConfig(mode="flat", kv_control="shuffled"),
    "random": DistillConfig(mode="flat", kv_control="random"),
    "wide": DistillConfig(mode="flat", layer_map="uniform"),
}
CONTROLS = ("none", "shuffled", "random")
EVERY = [Question("flat", control) for control in CONTROLS]

MakeExperiment = Callable[..., Any]


def claims_of(make_experiment: MakeExperiment, questions: list[Question], **ce: float) -> list[Claim]:
    arms = dict.fromkeys(RECIPES, 0.9) | {"flat": 0.4} | ce
    finished = make_experiment(arms, recipes=RECIPES, comparisons=questions)
    return collect(finished.config, finished.outcome, finished.runs_dir).claims


def test_an_arm_that_beats_all_three_is_helped(make_experiment: MakeExperiment) -> None:
    (claim,) = claims_of(make_experiment, EVERY)
    assert claim.holds
    assert claim.beaten == {"no KV": ("none",), "shuffled KV": ("shuffled",), "random KV": ("random",)}
    assert claim_sentence(claim) == (
        "The teacher's KV helps flat: it is better than no KV (none), shuffled KV (shuffled), random KV (random)."
    )


@pytest.mark.parametrize("control", CONTROLS)
def test_one_control_that_is_not_beaten_is_enough(make_experiment: MakeExperiment, control: str) -> None:
    (claim,) = claims_of(make_experiment, EVERY, **{control: 0.4})
    assert not claim.holds
    assert list(claim.unbeaten.values()) == [(control,)]
    assert f"is not shown to be better than {next(iter(claim.unbeaten))} ({control})" in claim_sentence(claim)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_that_is_not_asked_for_is_missing(make_experiment: MakeExperiment, control: str) -> None:
    (claim,) = claims_of(make_experiment, [question for question in EVERY if question.control != control])
    assert not claim.holds
    assert len(claim.missing) == 1
    assert f"it is not compared with {claim.missing[0]}" in claim_sentence(claim)


def test_another_recipes_controls_are_none_of_an_arms_own(make_experiment: MakeExperiment) -> None:
    found = claims_of(make_experiment, [*EVERY, Question("wide", "random"), Question("wide", "flat")], wide=0.2)
    assert [claim.arm for claim in found] == ["flat"]


def test_a_control_that_reads_another_store_is_none(make_experiment: MakeExperiment) -> None:
    finished = make_experiment(dict.fromkeys(RECIPES, 0.9) | {"flat": 0.4}, recipes=RECIPES, comparisons=EVERY)
    comparisons = collect(finished.config, finished.outcome, finished.runs_dir).comparisons["ce"]
    stores = {"small": replace(finished.config.extract, codec="int4")}
    (claim,) = claims(replace(finished.config, stores=stores, arm_stores={"random": ("small",)}), comparisons)
    assert claim.missing == ("random KV",)


def test_of_several_controls_of_a_kind_all_have_to_be_beaten(make_experiment: MakeExperiment) -> None:
    recipes = {**RECIPES, "other": replace(RECIPES["none"], kv_weight=2.0)}
    questions = [Question("flat", "other"), *EVERY]
    arms = dict.fromkeys(recipes, 0.9) | {"flat": 0.4, "other": 0.4}
    finished = make_experiment(arms, recipes=recipes, comparisons=questions)
    (claim,) = collect(finished.config, finished.outcome, finished.runs_dir).claims
    assert not claim.holds
    assert claim.unbeaten == {"no KV": ("other",)}
    assert claim.beaten["no KV"] == ("none",)


def test_a_student_that_learns_otherwise_is_no_control(make_experiment: MakeExperiment) -> None:
    """It would be easy to beat one that was made to learn badly."""
    recipes = {**RECIPES, "none": replace(RECIPES["none"], learning_rate=1e-6)}
    finished = make_experiment(dict.fromkeys(recipes, 0.9) | {"flat": 0.4}, recipes=recipes, comparisons=EVERY)
    (claim,) = collect(finished.config, finished.outcome, finished.runs_dir).claims
    assert claim.missing == ("no KV",)


def test_a_control_asked_for_with_a_margin_too_is_beaten_where_either_says_so(make_experiment: MakeExperiment) -> None:
    (claim,) = claims_of(make_experiment, [*EVERY, Question("flat", "none", 5.0)])
    assert claim.holds
