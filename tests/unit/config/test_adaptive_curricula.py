"""Recipes with rescoring and sample weights: what is valid, and what contradicts."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ds.config import registry
from pocl_ds.config.curriculum_checks import rescoring_runs_teacher
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import RecipeError


def make_recipe(curriculum: dict[str, Any], **changes: Any) -> Any:
    return check_recipe(
        {
            "name": "x",
            "data": {"source": "d.jsonl"},
            "teacher": {"model": "t"},
            "student": {"model": "s"},
            "curriculum": curriculum,
            **changes,
        }
    )


def test_a_recipe_with_both() -> None:
    curriculum = {
        "rescoring": {"difficulty": "loss_ratio", "from_stage": 1},
        "sample_weights": {"name": "loss", "options": {"power": 2}},
    }
    recipe = make_recipe(curriculum, ranking={"strategy": "random"})
    assert recipe.curriculum.rescoring.share == 1 and not recipe.scores_samples
    assert make_recipe({"rescoring": {}}).curriculum.rescoring.from_stage == 2
    assert make_recipe({"sample_weights": {"name": "pass_rate"}}).curriculum.rescoring is None


RANDOM = {"ranking": {"strategy": "random"}}


@pytest.mark.parametrize(
    ("curriculum", "changes", "expected"),
    [
        ({"rescoring": {"difficulty": "cross_entropy"}}, {}, False),
        ({"rescoring": {"difficulty": "fusion"}}, {}, False),
        ({"rescoring": {"difficulty": "kd_loss"}}, {}, True),
        ({"rescoring": {"difficulty": "loss_ratio"}}, {}, True),
        ({"rescoring": {}, "sample_weights": {"name": "band"}}, {}, False),
        ({"rescoring": {"from_stage": 1}, "sample_weights": {"name": "loss"}}, RANDOM, True),
        # What a plugin reads is unknown: it gets the teacher's scores if there can be any.
        ({"rescoring": {"difficulty": "own"}}, {}, True),
        ({"rescoring": {}, "sample_weights": {"name": "own"}}, {}, True),
        ({"rescoring": {"difficulty": "own"}}, {"loss": {"name": "sft"}, "teacher": None}, False),
        ({"rescoring": {"difficulty": "own"}}, {"loss": {"name": "uld"}}, False),
        (
            {"rescoring": {"difficulty": "own"}},
            {"teacher": {"model": "t", "mode": "cached_topk"}},
            False,
        ),
    ],
)
def test_the_teacher_runs_where_its_scores_may_be_read(
    curriculum: dict[str, Any],
    changes: dict[str, Any],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry.DIFFICULTIES, "own", None)
    monkeypatch.setitem(registry.SAMPLE_WEIGHTS, "own", {})
    recipe = make_recipe(curriculum, **changes)
    section = recipe.curriculum
    runs = rescoring_runs_teacher(
        section.rescoring, section.sample_weights, recipe.loss, recipe.teacher
    )
    assert runs == expected


@pytest.mark.parametrize(
    ("curriculum", "changes", "problem"),
    [
        ({"sample_weights": {"name": "pas_rate"}}, {}, "no rule 'pas_rate'.*pass_rate"),
        ({"sample_weights": {"name": "band", "options": {"low": 0}}}, {}, "no option 'low'"),
        (
            {"sample_weights": {"name": "band", "options": {"easiest": 0.8, "hardest": 0.2}}},
            {},
            "easiest=0.8 must be below hardest=0.2",
        ),
        ({"sample_weights": {"name": "band", "options": {"hardest": 2}}}, {}, "between 0 and 1"),
        ({"sample_weights": {"name": "pass_rate", "options": {"alpha": -1}}}, {}, "at least 0"),
        ({"sample_weights": {"name": "stratified", "options": {"share": 0}}}, {}, "leaves no samp"),
        ({"sample_weights": {"name": "loss"}}, {}, "set curriculum.rescoring.from_stage=1"),
        ({"sample_weights": {"name": "pass_rate"}}, RANDOM, "reads ROUGE-L, which"),
        ({"rescoring": {"difficulty": "kd_los"}}, {}, "kd_loss"),
        ({"rescoring": {"from_stage": 5}}, {}, "from_stage=5 is after the last of num_subsets=4"),
        ({"rescoring": {"share": 0}}, {}, "share"),
        ({"rescoring": {"difficulty": "fusion"}}, RANDOM, "reads ROUGE-L, which"),
        ({"rescoring": {"from_stage": 1}}, {}, "ranking.strategy=fusion has no effect"),
        (
            {"rescoring": {"difficulty": "kd_loss"}},
            {"loss": {"name": "sft"}, "teacher": None},
            "loss.name=sft does not compare",
        ),
        (
            {"rescoring": {"difficulty": "loss_ratio"}},
            {"teacher": {"model": "t", "mode": "cached_topk"}},
            "teacher.mode=cached_topk does not cache",
        ),
    ],
)
def test_contradictions_are_one_sentence(
    curriculum: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(RecipeError, match=problem):
        make_recipe(curriculum, **changes)
