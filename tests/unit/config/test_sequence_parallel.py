"""Ranks that share a micro-batch: what a recipe may say, and what it means."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPT2Config

from pocl_ds.config import Recipe
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import ModelError, RecipeError
from pocl_ds.models.sequence_shards import check_heads, key_copies
from pocl_ds.workflow.steps import fingerprints


def make_recipe(train: dict[str, Any], **sections: Any) -> Recipe:
    return check_recipe(
        {
            "name": "x",
            "data": {"source": "train.jsonl"},
            "teacher": {"model": "org/teacher"},
            "student": {"model": "org/student"},
            "launch": {"ranks": 8},
            **sections,
            "train": train,
        }
    )


def test_a_group_counts_as_one_rank_in_the_batch() -> None:
    recipe = make_recipe({"sequence_parallel_size": 4, "batch_size": 16, "micro_batch_size": 8})
    assert recipe.train.sequence_parallel_size == 4
    assert fingerprints(recipe) == fingerprints(make_recipe({"batch_size": 16}, launch={}))


@pytest.mark.parametrize(
    ("train", "sections", "message"),
    [
        ({"sequence_parallel_size": 0}, {}, "train.sequence_parallel_size"),
        (
            {"sequence_parallel_size": 3},
            {},
            "train.sequence_parallel_size=3 does not divide launch.ranks=8 into groups",
        ),
        (
            {"sequence_parallel_size": 2, "layout": "padded"},
            {},
            "train.layout=padded makes none: set train.layout=packed",
        ),
        (
            {"sequence_parallel_size": 2, "batch_size": 8, "micro_batch_size": 4},
            {},
            "x launch.ranks=8 / train.sequence_parallel_size=2 = 16",
        ),
        (
            {"sequence_parallel_size": 2},
            {"teacher": {"model": "org/teacher", "attn_implementation": "sdpa"}},
            "teacher.attn_implementation=sdpa does not read: set it to per_sample",
        ),
        (
            {"sequence_parallel_size": 2},
            {"loss": {"name": "uld"}},
            "loss.name=uld compares spans: choose a divergence such as fkl",
        ),
        (
            {"sequence_parallel_size": 2},
            {"teacher": {"model": "org/teacher", "placement": "own_ranks", "ranks": 1}},
            "teacher.placement=own_ranks runs the teacher on complete rows",
        ),
        (
            {"sequence_parallel_size": 2},
            {"teacher": {"model": "org/teacher", "template": "own"}},
            "teacher.template=own gives the teacher other rows: set it to student",
        ),
    ],
)
def test_contradictions(train: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make_recipe(train, **sections)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_heads_that_a_group_cannot_divide_are_refused() -> None:
    check_heads(GPT2Config(n_head=12), 6)
    with pytest.raises(
        ModelError, match="the gpt2 model has 12: set it to one of 1, 2, 3, 4, 6, 12"
    ):
        check_heads(GPT2Config(n_head=12), 8)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "copies"),
    [(8, 8, 4, 1), (8, 4, 4, 1), (8, 2, 4, 2), (8, 1, 8, 8), (12, 4, 6, 3), (6, 3, 2, 2)],
)
def test_keys_are_repeated_as_seldom_as_possible(
    heads: int, groups: int, size: int, copies: int
) -> None:
    assert key_copies(heads, groups, size) == copies
