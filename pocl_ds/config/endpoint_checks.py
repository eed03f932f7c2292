"""Checks of `teacher.endpoint` against the other sections: what a served teacher cannot give.

Each check raises ValueError with one sentence that names the fields and the remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocl_ds.config.registry import CROSS_TOKENIZER_LOSSES

if TYPE_CHECKING:
    from pocl_ds.config import Recipe


def check_endpoint(recipe: Recipe) -> None:
    """Raise ValueError if the recipe needs more of the teacher than its servers give."""
    if recipe.teacher is None or recipe.teacher.endpoint is None:
        return
    _check_one_model(recipe)
    if recipe.policy.name == "seqkd":
        return
    if recipe.teacher.is_text_only:
        raise ValueError(
            "teacher.endpoint.api=chat exchanges texts, which only policy.name=seqkd trains on, "
            f"and policy.name is {recipe.policy.name}: set teacher.endpoint.api=completions, or "
            "policy.name=seqkd and loss.name=sft"
        )
    _check_outputs(recipe)
    _check_temperatures(recipe)


def _check_one_model(recipe: Recipe) -> None:
    """Fields that choose or change models which the servers do not run."""
    teacher = recipe.teacher
    assert teacher is not None
    if conflicting := "teacher.ensemble" if teacher.ensemble else teacher.routes_field:
        raise ValueError(
            f"teacher.endpoint runs one teacher, and {conflicting} names more: remove one of "
            "the two"
        )
    if teacher.quantization != "none":
        raise ValueError(
            "teacher.endpoint runs the teacher as its server was started, so that "
            f"teacher.quantization={teacher.quantization} has no effect: remove it"
        )
    if recipe.teacher_cache.backend == "vllm":
        raise ValueError(
            "teacher_cache.backend=vllm runs the teacher in this job, and teacher.endpoint "
            "elsewhere: remove one of the two"
        )
    if recipe.student.heal_steps:
        raise ValueError(
            f"student.heal_steps={recipe.student.heal_steps} needs the teacher in every step, "
            "which teacher.endpoint does not give: set it to 0, or remove teacher.endpoint"
        )


def _check_outputs(recipe: Recipe) -> None:
    """Outputs of the teacher other than log-probabilities of a few ids on the data."""
    teacher, policy, loss = recipe.teacher, recipe.policy, recipe.loss.name
    assert teacher is not None
    reason = None
    if policy.on_policy or policy.uses_teacher_responses:
        reason = f"policy.name={policy.name} needs the teacher's outputs on new responses"
    elif loss in CROSS_TOKENIZER_LOSSES:
        reason = f"loss.name={loss} needs the teacher's outputs in its own tokens"
    elif not recipe.loss.fused:
        reason = "loss.fused=false needs the teacher's complete logits"
    if reason:
        raise ValueError(
            f"{reason}, and teacher.endpoint gives log-probabilities of a few ids of the data: "
            "remove teacher.endpoint"
        )
    if teacher.mode != "cached_topk":
        raise ValueError(
            "teacher.endpoint gives the teacher_cache.top_k largest log-probabilities of each "
            f"token, and teacher.mode={teacher.mode} needs more: set teacher.mode=cached_topk"
        )


def _check_temperatures(recipe: Recipe) -> None:
    """Temperatures other than 1: the mass of all other ids at one does not follow from that at
    another.
    """
    fields = {f"curriculum.temperature={list(recipe.curriculum.temperature)}": "[1, 1]"}
    temperatures = [*recipe.curriculum.temperature]
    if recipe.baseline.enabled:
        fields[f"baseline.temperature={recipe.baseline.temperature:g}"] = "1"
        temperatures.append(recipe.baseline.temperature)
    if any(temperature != 1 for temperature in temperatures):
        remedies = " and ".join(
            f"{field.partition('=')[0]}={remedy}" for field, remedy in fields.items()
        )
        raise ValueError(
            "teacher.endpoint gives log-probabilities at temperature 1, from which those at "
            f"another do not follow, and the recipe has {' and '.join(fields)}: set {remedies}, "
            "or cache the teacher's hidden states without teacher.endpoint"
        )
