"""Checks of a recipe against the configurations of its models, before data are encoded, and of its
teachers against the domains of the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pocl_ds.config import ModelSource, Recipe, StudentConfig, TeacherConfig
from pocl_ds.data.split_sources import read_split_domains
from pocl_ds.errors import ModelError, RecipeError
from pocl_ds.models.dropout import check_layer_dropping
from pocl_ds.models.load import (
    load_model_config,
    max_positions,
    resolve_model,
)
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.step_inputs import evaluated_models


def check_model_configs(
    recipe: Recipe, student: StudentConfig, teacher: TeacherConfig | None
) -> None:
    """Check that the student can be trained as the recipe says, and that no step needs more
    positions than its model has.

    Raises ModelError.
    """
    check_layer_dropping(resolve_model(student), _read_config(student), student.dropout)
    teachers = teacher.sources if teacher else ()
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


def check_domains(run: RunDirectory, teacher: TeacherConfig | None) -> None:
    """Raise RecipeError for a domain in teacher.by_domain that no training sample has. Does nothing
    before `preprocess` has finished.
    """
    if teacher is None or not teacher.by_domain or read_manifest(run.data) is None:
        return
    domains = read_split_domains(run.data, "train")
    counts = domains.counts if domains else {}
    for name in teacher.by_domain:
        if name not in counts:
            occurring = ", ".join(f"{domain} {count:,}" for domain, count in counts.items())
            raise RecipeError(
                f"recipe field teacher.by_domain.{name}: no training sample has the domain "
                f"{name!r} (domains and their samples: {occurring}): correct the name, or remove it"
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
