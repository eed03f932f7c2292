"""Checks of a recipe that run before any model is loaded."""

from __future__ import annotations

import importlib.util

from pocl_ds.config import Recipe, ds_config
from pocl_ds.curriculum.plan_step import plan_from_config
from pocl_ds.errors import RecipeError, ResourceError
from pocl_ds.runtime.process_exit import rank_and_world_size
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def check_world_size(recipe: Recipe) -> None:
    """Raise RecipeError if the launcher started more or fewer ranks than the recipe has."""
    _, ranks = rank_and_world_size()
    if ranks == recipe.total_ranks:
        return
    fields = f"launch.ranks={recipe.launch.ranks}"
    remedy = f"start {recipe.total_ranks}"
    if recipe.teacher_ranks:
        fields += f" and teacher.ranks={recipe.teacher_ranks}"
    if ranks > recipe.teacher_ranks:
        remedy += f", or add launch.ranks={ranks - recipe.teacher_ranks}"
    raise RecipeError(f"{ranks} ranks were started, and the recipe has {fields}: {remedy}")


def check_ds_configs(recipe: Recipe) -> None:
    """Raise RecipeError if a ds_config contradicts the recipe."""
    ranks = recipe.launch.ranks
    ds_config.resolve_student(
        recipe.student.ds_config, train=recipe.train, dtype=recipe.student.dtype, ranks=ranks
    )
    if recipe.teacher:
        ds_config.resolve_teacher(
            recipe.teacher.ds_config,
            dtype=recipe.teacher.dtype,
            ranks=recipe.teacher_ranks or ranks,
            micro_batch_size=recipe.train.micro_batch_size,
        )


def check_harness(recipe: Recipe) -> None:
    """Raise ResourceError if `evaluate.harness` is set and lm_eval is not installed."""
    if recipe.evaluate.harness and importlib.util.find_spec("lm_eval") is None:
        raise ResourceError(
            "evaluate.harness needs the package lm_eval, which is not installed: pip install "
            "'pocl_ds[harness]'"
        )


def check_most_samples(recipe: Recipe) -> None:
    """Raise RecipeError if the training that the recipe describes needs more samples than its data
    section allows, before the data are read and counted.
    """
    data = recipe.data
    if data.max_train_samples is not None:
        _check_training_samples(recipe, data.max_train_samples)
    if data.held_out_source("validation") is None and not data.validation_fraction:
        _check_validation_samples(recipe, 0)


def check_sample_counts(run: RunDirectory, recipe: Recipe) -> None:
    """Raise RecipeError if the data that `preprocess` counted is too small for the training that
    the recipe describes. Does nothing before `preprocess` has finished.
    """
    manifest = read_manifest(run.data)
    if manifest is None:
        return
    splits = manifest.info["splits"]
    _check_training_samples(recipe, int(splits["train"]["samples"]))
    _check_validation_samples(recipe, int(splits["validation"]["samples"]))


def _check_validation_samples(recipe: Recipe, samples: int) -> None:
    """Raise RecipeError if a choice follows the validation loss and there are no samples for it."""
    is_distillm = recipe.policy.name == "distillm"
    if (is_distillm or recipe.train.checkpoint.keep_best) and not samples:
        field = "policy.name=distillm" if is_distillm else "train.checkpoint.keep_best"
        raise RecipeError(
            f"{field} follows the validation loss, and the data has no validation samples: raise "
            "data.validation_fraction, or name a file in data.validation"
        )


def _check_training_samples(recipe: Recipe, samples: int) -> None:
    """Raise RecipeError if so many training samples are too few."""
    train, policy = recipe.train, recipe.policy
    plan = plan_from_config(range(samples), recipe.curriculum, batch_size=train.batch_size)

    # The learning rate must finish its warm-up, in each stage or in the whole run.
    per_stage = train.lr_restart == "per_stage"
    steps = min(stage.steps for stage in plan.stages) if per_stage else plan.total_steps
    if train.warmup_steps >= steps:
        raise RecipeError(
            f"train.warmup_steps={train.warmup_steps} never ends in the {steps} optimizer steps of "
            f"{'a stage' if per_stage else 'the run'}, so the learning rate never reaches "
            "train.lr: lower it"
        )
    if recipe.student.heal_steps and samples < train.batch_size:
        raise RecipeError(
            f"train.batch_size={train.batch_size} is more than the {samples} training samples: "
            "healing needs one full batch; lower it"
        )

    # Each shard of the scores needs a sample, and the policy enough steps and samples.
    if recipe.scores_samples and recipe.score.shards > samples:
        raise RecipeError(
            f"score.shards={recipe.score.shards} is more than the {samples} training samples: make "
            "fewer shards"
        )
    is_distillm, interval = policy.name == "distillm", train.validate_every_n_steps
    if is_distillm and interval and interval >= plan.total_steps:
        raise RecipeError(
            f"train.validate_every_n_steps={interval} is not reached in the {plan.total_steps} "
            "optimizer steps of the run, so the probability of policy.name=distillm never changes: "
            "lower it"
        )
    if is_distillm and policy.replay_buffer_size > samples:
        raise RecipeError(
            f"policy.replay_buffer_size={policy.replay_buffer_size} is more than the {samples} "
            "training samples: lower it"
        )
