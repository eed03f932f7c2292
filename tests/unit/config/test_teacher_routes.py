"""Teachers by stage and by domain: what a recipe may say."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ds.config import Recipe
from pocl_ds.config.recipe_file import check_recipe, dump_recipe, override_recipe
from pocl_ds.config.yaml_io import parse_yaml
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.step_inputs import caches_teacher, teacher_inputs
from pocl_ds.workflow.steps import STEP, cached_model_fingerprints, fingerprints

OTHER = {"model": "org/other"}
MIXTURE = [{"source": "a.jsonl", "name": "math"}, {"source": "b.jsonl", "name": "chat"}]


def make_recipe(teacher: dict[str, Any], **sections: Any) -> Recipe:
    return check_recipe(
        {
            "name": "x",
            "data": {"source": "train.jsonl", "fields": {"domain": "category"}},
            "teacher": {"model": "org/teacher", **teacher},
            "student": {"model": "org/student"},
            "curriculum": {"num_subsets": 3},
            **sections,
        }
    )


def test_sources_are_named_by_their_fields() -> None:
    teacher = make_recipe({"by_stage": {2: OTHER, 3: {**OTHER, "revision": "v2"}}}).teacher
    assert teacher is not None and teacher.routes_field == "teacher.by_stage"
    assert {field: source.label for field, source in teacher.named_sources.items()} == {
        "teacher": "org/teacher",
        "teacher.by_stage.2": "org/other",
        "teacher.by_stage.3": "org/other@v2",
    }
    assert len(teacher.single_stage.sources) == 1


def test_a_recipe_is_written_read_and_overridden() -> None:
    recipe = make_recipe({"by_stage": {2: OTHER}})
    assert check_recipe(parse_yaml(dump_recipe(recipe))) == recipe
    changed = override_recipe(recipe, ["teacher.by_stage.2.model=org/third"]).teacher
    assert changed is not None and changed.by_stage[2].model == "org/third"
    tree = {**recipe.model_dump(), "teacher": {"model": "a", "by_stage": {2: OTHER, "3": OTHER}}}
    assert check_recipe(tree).teacher is not None


def test_every_teacher_enters_the_fingerprint() -> None:
    recipes = [
        make_recipe(teacher)
        for teacher in (
            {},
            {"by_stage": {2: OTHER}},
            {"by_stage": {3: OTHER}},
            {"by_domain": {"math": OTHER}},
        )
    ]
    inputs = [repr(teacher_inputs(recipe)) for recipe in recipes]
    assert len(set(inputs)) == len(inputs)


def test_auto_is_online() -> None:
    assert caches_teacher(make_recipe({"mode": "auto"}))
    assert not caches_teacher(make_recipe({"mode": "auto", "by_stage": {2: OTHER}}))


@pytest.mark.parametrize("routes", [{"by_stage": {2: OTHER}}, {"by_domain": {"math": OTHER}}])
@pytest.mark.parametrize("mode", ["cached_hidden_states", "cached_topk", "cached_sampled"])
def test_cached_modes_are_allowed(routes: dict[str, Any], mode: str) -> None:
    assert caches_teacher(make_recipe({"mode": mode, **routes}, loss={"name": "fkl"}))


def test_a_changed_teacher_changes_its_own_outputs_alone() -> None:
    routes = {2: OTHER, 3: {"model": "org/large"}}
    before, after, baseline = (
        cached_model_fingerprints(make_recipe({"mode": mode, "by_stage": by_stage}, **sections))
        for mode, by_stage, sections in (
            ("cached_hidden_states", routes, {}),
            ("cached_hidden_states", {**routes, 3: {"model": "org/larger"}}, {}),
            ("cached_hidden_states", routes, {"baseline": {"enabled": True}}),
        )
    )
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"teacher.by_stage.3"} and baseline == before


def test_a_cache_by_stage_depends_on_the_plan() -> None:
    step, cached = STEP["cache-teacher"], {"mode": "cached_hidden_states"}
    by_stage = {**cached, "by_stage": {2: OTHER}}
    assert step.dependencies_of(make_recipe(by_stage)) == ("preprocess", "plan")
    for teacher in (cached, {**cached, "by_domain": {"math": OTHER}}, {"by_stage": {2: OTHER}}):
        assert step.dependencies_of(make_recipe(teacher)) == ("preprocess",)
    rescored = {"num_subsets": 3, "rescoring": {"from_stage": 2}}
    assert "plan" in step.dependencies_of(make_recipe(by_stage, curriculum=rescored))
    rescored["rescoring"] = {"from_stage": 1}
    recipe = make_recipe(by_stage, curriculum=rescored, ranking={"strategy": "random"})
    assert "plan" not in step.dependencies_of(recipe)

    # The plan and the baseline decide who has which samples.
    digests = [
        fingerprints(make_recipe(by_stage, **sections))["cache-teacher"]
        for sections in ({}, {"curriculum": {"num_subsets": 4}}, {"baseline": {"enabled": True}})
    ]
    assert len(set(digests)) == 3


def test_sources_of_a_mixture_are_domains() -> None:
    make_recipe({"by_domain": {"math": OTHER}}, data={"sources": MIXTURE})


@pytest.mark.parametrize(
    ("teacher", "sections", "message"),
    [
        (
            {"by_stage": {2: OTHER}, "by_domain": {"m": OTHER}},
            {},
            "by_stage and by_domain are both",
        ),
        ({"by_stage": {2: OTHER}, "ensemble": [OTHER]}, {}, "ensemble and by_stage are both set"),
        ({"by_stage": {4: OTHER}}, {}, "num_subsets=3 gives the stages 1 to 3"),
        ({"by_stage": {0: OTHER}}, {}, "greater than or equal to 1"),
        ({"by_stage": {2: OTHER, "02": OTHER}}, {}, "stage 2 appears twice"),
        ({"by_domain": {"": OTHER}}, {}, "at least 1 character"),
        (
            {"by_domain": {"math": OTHER}},
            {"data": {"source": "train.jsonl"}},
            "needs the domain of each sample: name the field .* as data.fields.domain",
        ),
        ({"by_stage": {2: OTHER}}, {"loss": {"name": "uld"}}, "loss.name=uld does not use one"),
        (
            {"by_stage": {2: OTHER}},
            {"loss": {"name": "sft"}, "policy": {"name": "seqkd"}},
            "loss.name=sft does not use one: remove teacher.by_stage",
        ),
        (
            {"by_stage": {2: OTHER}},
            {
                "policy": {"name": "mixture", "shares": {"data": 0.5, "teacher": 0.5}},
                "curriculum": {"num_subsets": 3, "sft_ratio": [0, 0]},
            },
            "generates with one teacher, and teacher.by_stage names more",
        ),
        (
            {"by_stage": {2: OTHER}, "template": "own"},
            {},
            "teacher.by_stage has one prompt for all: remove it",
        ),
    ],
)
def test_contradictions_are_refused(
    teacher: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(teacher, **sections)
