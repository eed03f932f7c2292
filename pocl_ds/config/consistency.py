"""Checks across sections: contradictions that the validation of one section cannot detect.

Each check raises ValueError with one sentence that names the fields and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pocl_ds.config.curriculum_checks import check_curriculum
from pocl_ds.config.endpoint_checks import check_endpoint
from pocl_ds.config.registry import (
    CROSS_TOKENIZER_LOSSES,
    LOSSES,
    SAMPLED_LOSS,
    TOKEN_RULES,
)
from pocl_ds.config.training_checks import check_training

if TYPE_CHECKING:
    from pocl_ds.config import Recipe
    from pocl_ds.config.loss import DivergenceConfig


# Options of built-in losses that must be between 0 and 1. An option of a plugin may be any finite
# number.
UNIT_INTERVAL_OPTIONS = {"jsd": ("beta",), "skl": ("skew",), "srkl": ("skew",), "akl": ("mu",)}

# Ranges of the options of built-in token rules. They bound exp(strength), and centers divide.
TOKEN_RULE_RANGES = {
    "adakd": {"strength": (-5.0, 5.0), "center": (0.001, 1.0), "threshold": (0.0, 1.0)},
    "entropy_weight": {"strength": (-5.0, 5.0), "center": (0.001, 100.0)},
    "position_decay": {"end_weight": (0.0, 1.0)},
}


def check_consistency(recipe: Recipe) -> None:
    """Raise ValueError if fields of different sections contradict each other."""
    check_training(recipe)
    _check_loss_options(recipe)
    _check_token_rule(recipe)
    _check_writers(recipe)
    _check_teacher(recipe)
    check_endpoint(recipe)
    _check_teacher_mode(recipe)
    _check_cached_values(recipe)
    _check_teacher_routes(recipe)
    _check_teacher_template(recipe)
    _check_teacher_responses(recipe)
    _check_on_policy(recipe)
    _check_distillm(recipe)
    check_curriculum(recipe)


def option_problem(name: str, options: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a divergence's options; None if nothing is."""
    for option, value in options.items():
        if not math.isfinite(value):
            return f"{name}: {option}={value:g} must be a finite number"
        if option in UNIT_INTERVAL_OPTIONS.get(name, ()) and not 0 <= value <= 1:
            return f"{name}: {option}={value:g} must be between 0 and 1"
    if name == "ab" and options["ab_alpha"] + options["ab_beta"] < 0:
        return "ab: ab_alpha + ab_beta must not be negative, or the loss is unbounded"
    return None


def _check_loss_options(recipe: Recipe) -> None:
    """Types and ranges of the options of all divergences."""
    named: dict[str, DivergenceConfig] = {"loss": recipe.loss}
    for writer, divergence in recipe.loss.by_writer.items():
        named[f"loss.by_writer.{writer}"] = divergence
    for field, divergence in named.items():
        name, defaults = divergence.name, LOSSES[divergence.name]
        _check_option_types(field, name, divergence.options, defaults)
        if problem := option_problem(name, {**defaults, **divergence.options}):
            raise ValueError(f"{field}.options of {problem}")


def _check_option_types(
    field: str, name: str, options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Whether each option is a flag or a number, as its default is."""
    for option, value in options.items():
        is_flag = isinstance(defaults[option], bool)
        if isinstance(value, bool) is not is_flag:
            expected = "true or false" if is_flag else "a number"
            raise ValueError(f"{field}.options.{option}={value} of {name} must be {expected}")


def token_rule_problem(name: str, options: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a token rule's options; None if nothing is."""
    for option, value in options.items():
        if not math.isfinite(value):
            return f"{name}: {option}={value:g} must be a finite number"
        low, high = TOKEN_RULE_RANGES.get(name, {}).get(option, (-math.inf, math.inf))
        if not low <= value <= high:
            return f"{name}: {option}={value:g} must be between {low:g} and {high:g}"
    return None


def _check_token_rule(recipe: Recipe) -> None:
    """Options of the token rule, and losses and teachers that a rule cannot work with."""
    rule, loss = recipe.loss.token_rule, recipe.loss.name
    if rule is None:
        return
    defaults = TOKEN_RULES[rule.name]
    _check_option_types("loss.token_rule", rule.name, rule.options, defaults)
    if problem := token_rule_problem(rule.name, {**defaults, **rule.options}):
        raise ValueError(f"loss.token_rule.options of {problem}")
    if loss == "sft" or loss in CROSS_TOKENIZER_LOSSES:
        raise ValueError(
            "loss.token_rule compares teacher and student over one vocabulary, and "
            f"loss.name={loss} does not: remove loss.token_rule, or choose a divergence such as fkl"
        )
    mode = "online" if recipe.teacher is None else recipe.teacher.mode
    if mode not in ("online", "cached_hidden_states", "auto"):
        raise ValueError(
            f"loss.token_rule needs the teacher at the temperature of each token, and teacher.mode="
            f"{mode} caches it at those of the stages: set it to cached_hidden_states or online"
        )


def _check_writers(recipe: Recipe) -> None:
    """Divergences by writer, and the writers that the policy has."""
    policy = recipe.policy
    writers = {
        "student": policy.on_policy and (policy.name != "mixture" or policy.shares.student > 0),
        "teacher": policy.uses_teacher_responses,
    }
    for writer, divergence in recipe.loss.by_writer.items():
        if not writers[writer]:
            raise ValueError(
                f"loss.by_writer.{writer} is never used, since policy.name={policy.name} "
                f"trains on no responses of the {writer}: remove it, or choose another policy"
            )
        for name in (recipe.loss.name, divergence.name):
            if name == "sft" or name in CROSS_TOKENIZER_LOSSES:
                raise ValueError(
                    f"loss.by_writer.{writer} chooses among divergences over one vocabulary, and "
                    f"{name} is none: remove loss.by_writer, or name a divergence such as skl"
                )


def _check_teacher(recipe: Recipe) -> None:
    """A recipe has a teacher if and only if it uses one."""
    if recipe.teacher is not None:
        if recipe.loss.name == "sft" and not recipe.policy.uses_teacher_responses:
            raise ValueError(
                "loss.name=sft does not use the teacher: remove the teacher section, or choose a "
                "divergence"
            )
        return
    if recipe.loss.name != "sft":
        raise ValueError(
            f"loss.name={recipe.loss.name} needs a teacher: set teacher.model, or loss.name=sft"
        )
    if recipe.student.heal_steps:
        raise ValueError(
            f"student.heal_steps={recipe.student.heal_steps} is distillation and needs a teacher: "
            "set it to 0"
        )


def _check_teacher_mode(recipe: Recipe) -> None:
    """Losses that do not work with a cached teacher or with an ensemble."""
    teacher, loss = recipe.teacher, recipe.loss.name
    if teacher is None:
        return
    if teacher.placement == "own_ranks" and loss == "sft":
        raise ValueError(
            "teacher.placement=own_ranks starts ranks that run the teacher in training, and "
            "loss.name=sft does not run it: set teacher.placement=with_student"
        )
    if teacher.mode != "online":
        reason = None
        if recipe.cross_tokenizer:
            reason = f"loss.name={loss} needs the teacher's outputs in the teacher's own tokens"
        elif not recipe.loss.fused:
            reason = "loss.fused=false needs the teacher's complete logits"
        elif teacher.ensemble:
            reason = "teacher.ensemble needs every teacher's logits"
        if reason:
            raise ValueError(
                f"{reason}, which teacher.mode={teacher.mode} does not cache: set "
                "teacher.mode=online"
            )
    if recipe.teacher_cache.backend == "vllm" and teacher.quantization == "bnb_8bit":
        raise ValueError(
            "teacher_cache.backend=vllm quantizes to 4 bits while loading, and "
            "teacher.quantization=bnb_8bit asks for 8: set it to bnb_4bit, or "
            "teacher_cache.backend=transformers"
        )
    if teacher.mode == "cached_sampled" and loss != SAMPLED_LOSS:
        raise ValueError(
            f"teacher.mode=cached_sampled estimates loss.name={SAMPLED_LOSS} without bias, since "
            f"its gradient is linear in the teacher's probabilities, and would bias loss.name="
            f"{loss}: set loss.name={SAMPLED_LOSS}, or teacher.mode=cached_hidden_states"
        )
    if teacher.routes_field and not recipe.needs_shared_vocabulary:
        raise ValueError(
            f"{teacher.routes_field} chooses among teachers over one vocabulary, and "
            f"loss.name={loss} does not use one: remove {teacher.routes_field}"
        )
    if teacher.ensemble and not recipe.needs_shared_vocabulary:
        raise ValueError(
            "teacher.ensemble mixes distributions over one vocabulary, and "
            f"loss.name={loss} does not use one: remove teacher.ensemble"
        )


def _check_cached_values(recipe: Recipe) -> None:
    """Fields of the cache that are of other values than the mode caches."""
    teacher = recipe.teacher
    if teacher is None:
        return
    cache = recipe.teacher_cache
    if teacher.mode in ("cached_topk", "cached_sampled") and cache.hidden_dtype != "model":
        raise ValueError(
            f"teacher_cache.hidden_dtype={cache.hidden_dtype} is of hidden states, which "
            f"teacher.mode={teacher.mode} does not cache: set it to model, or "
            "teacher.mode=cached_hidden_states"
        )
    if (
        teacher.mode in ("cached_hidden_states", "cached_sampled", "auto")
        and cache.top_p is not None
    ):
        raise ValueError(
            f"teacher_cache.top_p={cache.top_p:g} chooses among the largest probabilities, which "
            f"teacher.mode={teacher.mode} does not cache: set it to null, or "
            "teacher.mode=cached_topk"
        )


def _check_teacher_routes(recipe: Recipe) -> None:
    """Stages that the curriculum does not have, and domains where no sample has one."""
    teacher, data, stages = recipe.teacher, recipe.data, recipe.curriculum.num_subsets
    if teacher is None:
        return
    for stage in teacher.by_stage:
        if stage > stages:
            raise ValueError(
                f"teacher.by_stage.{stage} is a stage that the curriculum does not have: "
                f"curriculum.num_subsets={stages} gives the stages 1 to {stages}"
            )
    if teacher.by_domain and not data.has_domains:
        raise ValueError(
            "teacher.by_domain needs the domain of each sample: name the field that holds it as "
            "data.fields.domain, or give the domains as data.sources"
        )


def _check_teacher_template(recipe: Recipe) -> None:
    """What a teacher with its own prompts and the student's vocabulary excludes."""
    teacher = recipe.teacher
    if teacher is None or not recipe.needs_shared_vocabulary or recipe.teacher_template != "own":
        return
    problem = None
    if teacher.mode != "online":
        problem = f"teacher.mode={teacher.mode} caches outputs for the student's: set it to online"
    elif teacher.ensemble or teacher.routes_field:
        problem = f"{teacher.routes_field or 'teacher.ensemble'} has one prompt for all: remove it"
    elif recipe.data.train_on != "last_turn":
        problem = "earlier turns train in the student's alone: set data.train_on=last_turn"
    if problem:
        raise ValueError(f"teacher.template=own gives the teacher its own prompts, and {problem}")


def _check_teacher_responses(recipe: Recipe) -> None:
    """Policies that train on responses of the teacher."""
    policy, teacher = recipe.policy, recipe.teacher
    if policy.name == "seqkd" and (teacher is None or recipe.loss.name != "sft"):
        raise ValueError(
            "policy.name=seqkd is SFT on responses of the teacher: set loss.name=sft and "
            "teacher.model"
        )
    if not policy.uses_teacher_responses:
        return
    if teacher is None:
        raise ValueError(
            f"policy.name={policy.name} trains on responses of a teacher: set teacher.model"
        )
    if teacher.quantization != "none":
        raise ValueError(
            f"policy.name={policy.name} generates with the unquantized teacher: remove "
            f"teacher.quantization={teacher.quantization}"
        )
    if conflicting := "teacher.ensemble" if teacher.ensemble else teacher.routes_field:
        raise ValueError(
            f"policy.shares.teacher={policy.shares.teacher:g} generates with one teacher, and "
            f"{conflicting} names more: remove {conflicting}, or set policy.shares.teacher=0"
        )
    if teacher.mode == "online":
        return
    if policy.name == "seqkd":
        raise ValueError(
            "policy.name=seqkd uses no distributions of the teacher: remove "
            f"teacher.mode={teacher.mode}"
        )
    raise ValueError(
        f"policy.shares.teacher={policy.shares.teacher:g} needs the teacher's outputs on its own "
        f"responses, which teacher.mode={teacher.mode} does not cache: set teacher.mode=online"
    )


def _check_on_policy(recipe: Recipe) -> None:
    """Policies that train on responses of the student."""
    policy, teacher = recipe.policy, recipe.teacher
    if not policy.on_policy:
        return
    if teacher is None or recipe.loss.name == "sft":
        raise ValueError(
            f"policy.name={policy.name} distils on new responses of the student: set teacher.model "
            "and a divergence as loss.name"
        )
    if teacher.mode != "online":
        raise ValueError(
            f"policy.name={policy.name} needs the teacher's outputs on new responses, which "
            f"teacher.mode={teacher.mode} does not cache: set teacher.mode=online"
        )
    sft_ratios = [*recipe.curriculum.sft_ratio]
    remedy = "set curriculum.sft_ratio=[0, 0]"
    if recipe.baseline.enabled:
        sft_ratios.append(recipe.baseline.sft_ratio)
        remedy += " and baseline.sft_ratio=0"
    if any(sft_ratios):
        raise ValueError(
            f"policy.name={policy.name} trains on responses of the student, which cannot be "
            f"labels for SFT: {remedy}"
        )


def _check_distillm(recipe: Recipe) -> None:
    """Further requirements of the adaptive policy."""
    policy, train, samples = recipe.policy, recipe.train, recipe.data.max_train_samples
    if policy.name != "distillm":
        return
    if samples is not None and policy.replay_buffer_size > samples:
        raise ValueError(
            f"policy.replay_buffer_size={policy.replay_buffer_size} is more than "
            f"data.max_train_samples={samples}: make it smaller"
        )
    if not train.validate_max_samples:
        raise ValueError(
            "policy.name=distillm adapts to the validation loss: set train.validate_max_samples"
        )
    if train.validate_every_n_steps is None:
        raise ValueError(
            "policy.name=distillm adapts to the validation loss, which "
            "train.validate_every_n_steps=null computes only after each stage: set it to a number "
            "of steps, for example a tenth of all"
        )
