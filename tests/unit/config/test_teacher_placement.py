"""A teacher on its own ranks: what a recipe may say, and what it means."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ds.config import Recipe
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.steps import fingerprints

OWN = {"placement": "own_ranks", "ranks": 3}


def make_recipe(teacher: dict[str, Any], **sections: Any) -> Recipe:
    return check_recipe(
        {
            "name": "x",
            "data": {"source": "train.jsonl"},
            "teacher": {"model": "org/teacher", **teacher},
            "student": {"model": "org/student"},
            "launch": {"ranks": 2},
            **sections,
        }
    )


def test_the_teachers_ranks_come_on_top_of_the_students() -> None:
    assert (make_recipe({}).teacher_ranks, make_recipe({}).total_ranks) == (0, 2)
    assert (make_recipe(OWN).teacher_ranks, make_recipe(OWN).total_ranks) == (3, 5)
    # The batch is divided among the student's ranks alone.
    assert make_recipe(OWN, train={"batch_size": 2, "micro_batch_size": 1}).total_ranks == 5


def test_the_placement_changes_no_result() -> None:
    assert fingerprints(make_recipe(OWN)) == fingerprints(make_recipe({}))


@pytest.mark.parametrize(
    ("teacher", "sections", "message"),
    [
        ({"ranks": 2}, {}, "placement=with_student gives it none: set teacher.placement=own_ranks"),
        ({**OWN, "mode": "auto"}, {}, "mode=auto caches its outputs before: set teacher.mode=onli"),
        ({**OWN, "mode": "cached_topk"}, {}, "mode=cached_topk caches its outputs before"),
        (
            OWN,
            {"loss": {"name": "sft"}, "policy": {"name": "seqkd"}},
            "loss.name=sft does not run it: set teacher.placement=with_student",
        ),
    ],
)
def test_contradictions(teacher: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make_recipe(teacher, **sections)
    assert message in str(error.value) and "\n" not in str(error.value)
