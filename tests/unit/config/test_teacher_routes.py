"""Teachers by stage and by domain: what a recipe may say."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ds.config import Recipe
from pocl_ds.config.recipe_file import check_recipe, dump_recipe, override_recipe
from pocl_ds.config.yaml_io import parse_yaml
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.step_inputs import caches_teacher, teacher_inputs

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
        (
            {"by_domain": {"math": OTHER}, "mode": "cached_topk"},
            {},
            "by_domain needs the outputs of several teachers, which teacher.mode=cached_topk",
        ),
        (
            {"by_stage": {2: OTHER}, "mode": "cached_hidden_states"},
            {},
            "by_stage needs the outputs of several teachers",
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
