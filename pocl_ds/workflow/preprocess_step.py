"""What the workflow step `preprocess` runs: checks of recipe, models and tokenizers, then the data.

Imports of libraries are inside the functions, as in `step_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_ds.errors import ModelError

if TYPE_CHECKING:
    from pocl_ds.config import Recipe, StudentConfig, TeacherConfig
    from pocl_ds.workflow.run_dir import RunDirectory
    from pocl_ds.workflow.steps import StepRequest


def run_preprocess(
    recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest
) -> None:
    """Tokenize the data, after checking the recipe against the models' configurations and
    tokenizers.

    Raises ModelError if the loss or the healing needs one vocabulary and the tokenizers differ, or
    a model cannot read the tokens or the lengths that the recipe produces; DataError if
    `ranking.scores` lacks a column; RecipeError for a domain in `teacher.by_domain` that no
    training sample has.
    """
    from pocl_ds.data.preprocess import preprocess
    from pocl_ds.difficulty.score_files import check_score_file, score_columns
    from pocl_ds.evaluation.local_benchmarks import read_local_benchmarks
    from pocl_ds.models.load import load_tokenizer, resolve_commits, resolve_model
    from pocl_ds.workflow.model_checks import check_domains, check_model_configs
    from pocl_ds.workflow.token_checks import check_data_tokens, check_template_tokens

    # Pin the models of the Hub to their commits; later steps load the same ones.
    commits = resolve_commits(recipe.local_models)
    student, teacher = models_at_commits(recipe, commits)
    check_model_configs(recipe, student, teacher)
    student_path = resolve_model(student)
    tokenizer = load_tokenizer(
        student_path, trust_remote_code=student.trust_remote_code, revision=student.revision
    )

    # Compare the vocabularies now: a mismatch must not surface after hours of scoring.
    teacher_tokenizer, teacher_end_ids = None, list[int]()
    if teacher:
        if recipe.needs_shared_vocabulary:
            _check_vocabularies(recipe, student, student_path, teacher)
        teacher_tokenizer, teacher_end_ids = _teacher_side(recipe, teacher, tokenizer)

    # A file of scores must have the columns that the ranking will read.
    if recipe.ranking.scores is not None:
        columns = score_columns(recipe.ranking.strategy)
        check_score_file(Path(recipe.ranking.scores).expanduser(), columns)

    # Check the tokens of the template before the data are encoded, and those of the data after.
    check_template_tokens(recipe, student, teacher)
    preprocess(
        run,
        recipe.data,
        recipe.prompt,
        tokenizer,
        fingerprint,
        teacher_tokenizer,
        commits,
        teacher_end_ids=teacher_end_ids,
        read_benchmarks=lambda: read_local_benchmarks(recipe.evaluate),
    )
    check_domains(run, teacher)
    check_data_tokens(run, recipe, student, teacher)


def _check_vocabularies(
    recipe: Recipe, student: StudentConfig, student_path: str, teacher: TeacherConfig
) -> None:
    """Raise ModelError if teacher and student cannot share a vocabulary."""
    from pocl_ds.models.load import resolve_model
    from pocl_ds.models.vocab import IncompatibleTokenizers, align_teacher_vocabularies

    teachers = [(source, resolve_model(source)) for source in teacher.sources]
    try:
        align_teacher_vocabularies(teachers, student, student_path)
    except IncompatibleTokenizers:
        if recipe.loss.name != "sft":
            raise
        raise ModelError(
            f"student.heal_steps={recipe.student.heal_steps} heals by plain distillation, which "
            "needs one vocabulary, and teacher and student have different tokenizers: set it to 0"
        ) from None


def _teacher_side(recipe: Recipe, teacher: TeacherConfig, tokenizer: Any) -> tuple[Any, list[int]]:
    """The tokenizer of a teacher that reads other tokens or prompts than the student, else None;
    and the student's ids of the tokens that end the teacher's turns.
    """
    from pocl_ds.generation.end_of_turn import find_teacher_end_ids
    from pocl_ds.models.load import (
        load_generation_config,
        load_teacher_tokenizer,
        resolve_model,
    )
    from pocl_ds.workflow.token_checks import tell_teacher_prompts

    # The ids do not depend on the loss, so that another loss can use the same data.
    path = resolve_model(teacher)
    own_tokenizer = load_teacher_tokenizer(path, teacher, tokenizer, "own")
    settings = load_generation_config(path, teacher.revision)
    end_ids = find_teacher_end_ids(own_tokenizer, settings, tokenizer)
    tell_teacher_prompts(recipe, own_tokenizer, tokenizer)
    if not recipe.teacher_has_own_prompts:
        return None, end_ids
    return load_teacher_tokenizer(path, teacher, tokenizer, recipe.teacher_template), end_ids


def models_at_commits(
    recipe: Recipe, commits: Mapping[str, str]
) -> tuple[StudentConfig, TeacherConfig | None]:
    """Student and local teacher with their revisions pinned to commits."""
    from pocl_ds.models.load import pin_to_commit

    teacher = recipe.local_teacher
    if teacher:
        updates: dict[str, Any] = {
            "ensemble": tuple(pin_to_commit(member, commits) for member in teacher.ensemble)
        }
        for name in ("by_stage", "by_domain"):
            routes = getattr(teacher, name).items()
            updates[name] = {key: pin_to_commit(source, commits) for key, source in routes}
        teacher = pin_to_commit(teacher, commits).model_copy(update=updates)
    return pin_to_commit(recipe.student, commits), teacher
