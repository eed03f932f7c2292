"""Checks of a recipe against the configurations of its models, before data are encoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pocl_ds.config import ModelSource, Recipe, StudentConfig, TeacherConfig
from pocl_ds.errors import ModelError
from pocl_ds.models.load import (
    check_layer_dropping,
    load_model_config,
    max_positions,
    resolve_model,
)
from pocl_ds.workflow.step_inputs import evaluated_models


def check_model_configs(
    recipe: Recipe, student: StudentConfig, teacher: TeacherConfig | None
) -> None:
    """Check that the student can be trained as the recipe says, and that no step needs more
    positions than its model has.

    Raises ModelError.
    """
    check_layer_dropping(resolve_model(student), _read_config(student), student.dropout)
    teachers: tuple[ModelSource, ...] = (teacher, *teacher.ensemble) if teacher else ()
    for source in (student, *teachers):
        positions = max_positions(_read_config(source))
        if positions is None:
            continue
        for fields, tokens in _needed_positions(recipe, source, student, teacher):
            if tokens > positions:
                raise ModelError(
                    f"{fields} is more than the {positions} positions of {resolve_model(source)}: "
                    "lower it"
                )


def _needed_positions(
    recipe: Recipe, source: ModelSource, student: StudentConfig, teacher: TeacherConfig | None
) -> Iterator[tuple[str, int]]:
    """The fields that set how many tokens one model reads, and their sum, for each of its uses."""
    prompt, evaluate, policy = recipe.prompt, recipe.evaluate, recipe.policy
    yield f"prompt.max_length={prompt.max_length}", prompt.max_length
    new_tokens: dict[str, int] = {}
    if source is student:
        if recipe.scores_samples:
            new_tokens["score.max_new_tokens"] = recipe.score.max_new_tokens
        if set(evaluated_models(recipe)) - {"teacher"}:
            new_tokens["evaluate.max_new_tokens"] = evaluate.max_new_tokens
    if source is teacher:
        if policy.uses_teacher_responses:
            new_tokens["policy.max_new_tokens"] = policy.max_new_tokens
        if "teacher" in evaluated_models(recipe):
            new_tokens["evaluate.max_new_tokens"] = evaluate.max_new_tokens
    for field, count in new_tokens.items():
        fields = f"prompt.max_prompt_tokens={prompt.max_prompt_tokens} + {field}={count}"
        yield fields, prompt.max_prompt_tokens + count


def _read_config(source: ModelSource) -> Any:
    return load_model_config(
        resolve_model(source),
        trust_remote_code=source.trust_remote_code,
        revision=source.revision,
    )
