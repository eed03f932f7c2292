"""Contradictions between sections of a recipe: what each section cannot see for itself. Each is one
sentence with its remedy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pocl_ds.config.registry import LOSSES

if TYPE_CHECKING:
    from pocl_ds.config import Recipe


# Options of a loss that are shares, between 0 and 1. Those of a plugin may be any finite numbers,
# whatever they are called.
SHARES = {"jsd": ("beta",), "skl": ("skew",), "srkl": ("skew",), "akl": ("mu",)}


def check_consistency(recipe: Recipe) -> None:
    """Raise ValueError where fields of a recipe contradict each other."""
    _sizes(recipe)
    _loss(recipe)
    _teachers(recipe)
    _policy(recipe)


def _sizes(recipe: Recipe) -> None:
    """Numbers of samples, tokens and ranks, and what is looked at."""
    share = recipe.train.micro_batch_size * recipe.launch.ranks
    tokens = recipe.train.micro_batch_tokens
    if tokens is not None and tokens < recipe.prompt.max_length:
        raise ValueError(
            f"train.micro_batch_tokens={tokens} does not hold one sample of "
            f"prompt.max_length={recipe.prompt.max_length}: "
            "raise it, or lower prompt.max_length"
        )
    if tokens is None and recipe.train.batch_size % share:
        raise ValueError(
            f"train.batch_size={recipe.train.batch_size} is not a multiple of "
            f"train.micro_batch_size="
            f"{recipe.train.micro_batch_size} x launch.ranks={recipe.launch.ranks} = {share}: "
            f"change one of them"
        )
    if recipe.teacher is None and recipe.loss.name != "sft":
        raise ValueError(
            f"loss.name={recipe.loss.name} needs a teacher: set teacher.model, or loss.name=sft"
        )
    if recipe.teacher is None and recipe.student.heal_steps:
        raise ValueError(
            f"student.heal_steps={recipe.student.heal_steps} is distillation and needs a teacher: "
            f"set it to 0"
        )
    if 0 < recipe.student.heal_steps <= recipe.train.warmup_steps:
        raise ValueError(
            f"train.warmup_steps={recipe.train.warmup_steps} never ends in the "
            f"{recipe.student.heal_steps} steps of "
            "student.heal_steps: lower it, or heal longer"
        )
    if (
        recipe.teacher is not None
        and recipe.loss.name == "sft"
        and not recipe.policy.uses_teacher_responses
    ):
        raise ValueError(
            "loss.name=sft never asks the teacher: remove the teacher section, or name a divergence"
        )
    if (
        recipe.data.max_train_samples is not None
        and recipe.curriculum.num_subsets > recipe.data.max_train_samples
    ):
        raise ValueError(
            f"curriculum.num_subsets={recipe.curriculum.num_subsets} is more than data.max_train_samples="
            f"{recipe.data.max_train_samples}: make fewer subsets"
        )
    if recipe.train.checkpoint.keep_best and not recipe.train.validate_max_samples:
        raise ValueError(
            "train.checkpoint.keep_best follows the validation loss: set train.validate_max_samples"
        )
    if recipe.train.engine == "torch" and recipe.student.dtype != "float32":
        raise ValueError(
            f"train.engine=torch keeps no float32 copy of weights, and updates are lost in "
            f"{recipe.student.dtype}: "
            "set student.dtype=float32, or train.engine=deepspeed"
        )
    if recipe.train.min_lr > recipe.train.lr:
        raise ValueError(
            f"train.min_lr={recipe.train.min_lr:g} is above train.lr={recipe.train.lr:g}: the "
            f"cosine falls"
        )


def out_of_range(name: str, options: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a divergence's options; None where nothing is."""
    for option, value in options.items():
        if not math.isfinite(value):
            return f"{name}: {option}={value:g} must be a finite number"
        if option in SHARES.get(name, ()) and not 0 <= value <= 1:
            return f"{name}: {option}={value:g} must lie between 0 and 1"
    if name == "ab" and options["ab_alpha"] + options["ab_beta"] < 0:
        return "ab: ab_alpha + ab_beta must not be negative, or improbable ids weigh without bound"
    return None


def _loss(recipe: Recipe) -> None:
    """Values of the loss's options, before hours of scoring."""
    name, defaults = recipe.loss.name, LOSSES[recipe.loss.name]
    for option, value in recipe.loss.options.items():
        if isinstance(value, bool) is not isinstance(defaults[option], bool):
            wanted = "true or false" if isinstance(defaults[option], bool) else "a number"
            raise ValueError(f"loss.options.{option}={value} of {name} must be {wanted}")
    if fault := out_of_range(name, {**defaults, **recipe.loss.options}):
        raise ValueError(f"loss.options of {fault}")


def _teachers(recipe: Recipe) -> None:
    """Contradictions between how teachers are asked and the loss."""
    teacher, loss = recipe.teacher, recipe.loss.name
    if teacher is None:
        return
    if recipe.across_tokenizers and teacher.mode != "online":
        raise ValueError(
            f"loss.name={loss} lets the teacher read its own tokens, of which "
            f"teacher.mode={teacher.mode} keeps "
            "nothing: set teacher.mode=online"
        )
    if not recipe.loss.fused and teacher.mode != "online":
        raise ValueError(
            f"teacher.mode={teacher.mode} keeps what a teacher's head makes logits of, and "
            f"loss.fused=false knows "
            "no head: set teacher.mode=online"
        )
    if teacher.ensemble and teacher.mode != "online":
        raise ValueError(
            f"teacher.mode={teacher.mode} keeps what one teacher says, and teacher.ensemble names "
            f"more: set "
            "teacher.mode=online"
        )
    if teacher.ensemble and not recipe.one_vocabulary:
        raise ValueError(
            f"teacher.ensemble mixes distributions over the same tokens, and loss.name={loss} has "
            f"none: remove it"
        )


def _policy(recipe: Recipe) -> None:
    """Contradictions between the policy and the rest."""
    policy = recipe.policy
    if policy.name == "seqkd" and (recipe.teacher is None or recipe.loss.name != "sft"):
        raise ValueError(
            "policy.name=seqkd is SFT on responses of the teacher: set loss.name=sft and "
            "teacher.model"
        )
    if policy.uses_teacher_responses and recipe.teacher is None:
        raise ValueError(
            f"policy.name={policy.name} trains on responses of a teacher: set teacher.model"
        )
    if policy.uses_teacher_responses and recipe.teacher and recipe.teacher.quantization != "none":
        raise ValueError(
            f"policy.name={policy.name} lets the teacher write as its model says: remove "
            f"teacher.quantization="
            f"{recipe.teacher.quantization}"
        )
    if policy.uses_teacher_responses and recipe.teacher and recipe.teacher.ensemble:
        raise ValueError(
            f"policy.shares.teacher={policy.shares.teacher:g} lets one teacher write, and "
            f"teacher.ensemble names "
            "more: remove these, or set policy.shares.teacher=0"
        )
    if policy.name == "seqkd" and recipe.teacher and recipe.teacher.mode != "online":
        raise ValueError(
            f"policy.name=seqkd asks for no distributions: remove "
            f"teacher.mode={recipe.teacher.mode}"
        )
    if (
        policy.name == "mixture"
        and policy.uses_teacher_responses
        and recipe.teacher
        and recipe.teacher.mode != "online"
    ):
        raise ValueError(
            f"policy.shares.teacher={policy.shares.teacher:g} asks the teacher about responses "
            f"that teacher.mode="
            f"{recipe.teacher.mode} has not kept: set teacher.mode=online"
        )
    if not policy.on_policy:
        return
    if recipe.teacher is None or recipe.loss.name == "sft":
        raise ValueError(
            f"policy.name={policy.name} asks a teacher about new responses: set teacher.model and "
            f"a divergence"
        )
    if recipe.teacher.mode != "online":
        raise ValueError(
            f"policy.name={policy.name} asks the teacher about new responses, which teacher.mode="
            f"{recipe.teacher.mode} has not kept: set teacher.mode=online"
        )
    shares = [
        *recipe.curriculum.sft_ratio,
        *([recipe.baseline.sft_ratio] if recipe.baseline.enabled else []),
    ]
    if any(shares):
        raise ValueError(
            f"policy.name={policy.name} trains without SFT, whose labels the student itself would "
            f"write: set "
            "curriculum.sft_ratio=[0, 0]"
            + (" and baseline.sft_ratio=0" if recipe.baseline.enabled else "")
        )
    samples = recipe.data.max_train_samples
    if policy.name == "distillm" and samples is not None and policy.replay_buffer_size > samples:
        raise ValueError(
            f"policy.replay_buffer_size={policy.replay_buffer_size} is more than data.max_train_samples={samples}: make it "
            f"smaller"
        )
    if policy.name == "distillm" and not recipe.train.validate_max_samples:
        raise ValueError(
            "policy.name=distillm follows the validation loss: set train.validate_max_samples"
        )
    if policy.name == "distillm" and recipe.train.validate_every_n_steps is None:
        raise ValueError(
            "policy.name=distillm follows the validation loss, at which train.validate_every_n_steps=null "
            "looks after each "
            "stage only: set train.validate_every_n_steps to a number of steps, a tenth of all for one"
        )
