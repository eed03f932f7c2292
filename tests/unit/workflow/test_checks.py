"""Recipes that the data, or the ranks that were started, are too few for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pocl_ds.config import Recipe
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.checks import check_most_samples, check_sample_counts, check_world_size
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {
                "policy": {"name": "distillm", "replay_buffer_size": 8},
                "curriculum": {"sft_ratio": [0, 0]},
                "train": {"batch_size": 8, "validate_every_n_steps": 4},
            },
            "policy.name=distillm follows the validation",
        ),
        (
            {"train": {"batch_size": 8, "checkpoint": {"keep_best": True}}},
            "train.checkpoint.keep_best follows the validation loss",
        ),
    ],
)
def test_choices_that_follow_the_validation_loss_need_validation_samples(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Without validation samples the run would silently be plain distillation."""
    run = RunDirectory(tmp_path)
    tree = {
        "name": "r",
        "data": {"source": "d.jsonl"},
        "student": {"model": "m"},
        "teacher": {"model": "t"},
        "train": {"batch_size": 8},
        **fields,
    }
    for samples in (5, 0):
        splits = {"train": {"samples": 64}, "validation": {"samples": samples}}
        write_manifest(run.data, "preprocess", "f", info={"splits": splits}, files=[])
        if samples:
            check_sample_counts(run, Recipe.model_validate(tree))
    with pytest.raises(RecipeError, match=words):
        check_sample_counts(run, Recipe.model_validate(tree))


def test_a_validation_interval_longer_than_the_run_raises(tmp_path: Path) -> None:
    """A run of 20 steps: the probability of on-policy responses changes only at validations."""
    run = RunDirectory(tmp_path)
    write_manifest(
        run.data,
        "preprocess",
        "f",
        info={"splits": {"train": {"samples": 64}, "validation": {"samples": 9}}},
        files=[],
    )
    curriculum = {"num_subsets": 4, "epochs_per_stage": 1, "sft_ratio": [0, 0]}
    for interval in (19, 20):
        tree = {
            "name": "r",
            "data": {"source": "d.jsonl"},
            "student": {"model": "m"},
            "teacher": {"model": "t"},
            "policy": {"name": "distillm", "replay_buffer_size": 8},
            "train": {"batch_size": 8, "validate_every_n_steps": interval},
            "curriculum": curriculum,
        }
        if interval == 19:
            check_sample_counts(run, Recipe.model_validate(tree))
    with pytest.raises(
        RecipeError,
        match=r"train\.validate_every_n_steps=20 is not reached in the 20 optimizer steps",
    ):
        check_sample_counts(run, Recipe.model_validate(tree))


def test_a_warmup_longer_than_a_stage_or_the_run_raises(tmp_path: Path) -> None:
    """64 samples in four subsets: the first stage has two optimizer steps an epoch."""
    run = RunDirectory(tmp_path)
    write_manifest(
        run.data,
        "preprocess",
        "f",
        info={"splits": {"train": {"samples": 64}, "validation": {"samples": 9}}},
        files=[],
    )

    def check(warmup: int, lr_restart: str) -> None:
        train = {"batch_size": 8, "warmup_steps": warmup, "lr_restart": lr_restart}
        curriculum = {"num_subsets": 4, "epochs_per_stage": 1}
        tree = {
            "name": "r",
            "data": {"source": "d.jsonl"},
            "student": {"model": "m"},
            "teacher": {"model": "t"},
            "train": train,
            "curriculum": curriculum,
        }
        check_sample_counts(run, Recipe.model_validate(tree))

    check(1, "per_stage")
    check(19, "never")
    with pytest.raises(
        RecipeError, match="train.warmup_steps=2 never ends in the 2 optimizer steps of a stage"
    ):
        check(2, "per_stage")
    with pytest.raises(
        RecipeError, match="train.warmup_steps=20 never ends in the 20 optimizer steps of the run"
    ):
        check(20, "never")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"train": {"batch_size": 8, "warmup_steps": 40}},
            "train.warmup_steps=40 never ends in the 16 optimizer steps",
        ),
        ({"curriculum": {"num_subsets": 9}}, "stage 0 has 7 samples, fewer than train.batch_size"),
        ({"score": {"shards": 65}}, "score.shards=65 is more than the 64 training samples"),
        (
            {
                "data": {"source": "d.jsonl", "validation_fraction": 0},
                "train": {"batch_size": 8, "checkpoint": {"keep_best": True}},
            },
            "train.checkpoint.keep_best follows the validation loss",
        ),
    ],
)
def test_too_few_samples_are_refused_before_the_data_are_read(
    fields: dict[str, Any], message: str
) -> None:
    """data.max_train_samples bounds the samples of every run."""
    tree: dict[str, Any] = {
        "name": "r",
        "data": {"source": "d.jsonl", "max_train_samples": 64},
        "student": {"model": "m"},
        "teacher": {"model": "t"},
        "train": {"batch_size": 8},
    }
    check_most_samples(Recipe.model_validate(tree))
    with pytest.raises(RecipeError, match=message):
        check_most_samples(Recipe.model_validate({**tree, **fields}))


def test_samples_that_are_not_counted_yet_are_not_refused() -> None:
    tree = {
        "name": "r",
        "data": {"source": "d.jsonl"},
        "student": {"model": "m"},
        "teacher": {"model": "t"},
        "train": {"batch_size": 8, "warmup_steps": 10_000},
    }
    check_most_samples(Recipe.model_validate(tree))


@pytest.mark.parametrize(
    ("started", "teacher", "message"),
    [
        ("2", {}, None),
        (
            "3",
            {},
            "3 ranks were started, and the recipe has launch.ranks=2: start 2, or add "
            "launch.ranks=3",
        ),
        ("5", {"placement": "own_ranks", "ranks": 3}, None),
        (
            "4",
            {"placement": "own_ranks", "ranks": 3},
            "4 ranks were started, and the recipe has launch.ranks=2 and teacher.ranks=3: start 5, "
            "or add launch.ranks=1",
        ),
        (
            "3",
            {"placement": "own_ranks", "ranks": 3},
            "3 ranks were started, and the recipe has launch.ranks=2 and teacher.ranks=3: start 5",
        ),
    ],
)
def test_as_many_ranks_as_the_recipe_has_must_be_started(
    started: str, teacher: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {
        "name": "r",
        "teacher": {"model": "t", **teacher},
        "student": {"model": "s"},
        "data": {"source": "d.jsonl"},
        "launch": {"ranks": 2},
    }
    recipe = Recipe.model_validate(tree)
    monkeypatch.setenv("WORLD_SIZE", started)
    if message is None:
        check_world_size(recipe)
        return
    with pytest.raises(RecipeError) as exc_info:
        check_world_size(recipe)
    assert str(exc_info.value) == message
