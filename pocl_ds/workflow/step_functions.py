"""What each workflow step runs in this process: a function for each row of the table in `steps`.

Each passes on the parts of the recipe that its step needs. Imports of a step's own modules are
inside: `pocl rank` loads neither vLLM nor DeepSpeed, and `pocl --help` loads nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from pocl_ds.errors import RecipeError
from pocl_ds.workflow.step_inputs import (
    caches_teacher,
)

if TYPE_CHECKING:
    from pocl_ds.config import (
        ModelSource,
        Recipe,
        StudentConfig,
        TeacherConfig,
    )
    from pocl_ds.workflow.run_dir import RunDirectory
    from pocl_ds.workflow.steps import StepRequest

log = logging.getLogger("pocl_ds")


def _pinned_models(recipe: Recipe, run: RunDirectory) -> tuple[StudentConfig, TeacherConfig | None]:
    """Student and local teacher at the commits that the step `preprocess` recorded."""
    from pocl_ds.workflow.manifest import read_manifest
    from pocl_ds.workflow.preprocess_step import models_at_commits

    manifest = read_manifest(run.data)
    return models_at_commits(recipe, manifest.info["commits"] if manifest else {})


def _checked_models(
    recipe: Recipe, run: RunDirectory
) -> tuple[StudentConfig, TeacherConfig | None]:
    """`_pinned_models`, after the checks of `preprocess`, since other fields of the recipe may have
    changed after that step.
    """
    from pocl_ds.workflow.model_checks import check_domains, check_model_configs
    from pocl_ds.workflow.token_checks import check_data_tokens

    student, teacher = _pinned_models(recipe, run)
    check_model_configs(recipe, student, teacher)
    check_domains(run, teacher)
    check_data_tokens(run, recipe, student, teacher)
    return student, teacher


def check_tokenizer_of(
    recipe: Recipe,
    run: RunDirectory,
    path: str,
    source: ModelSource,
    owner: Literal["student", "teacher"] = "student",
) -> None:
    """Check that the step reads and writes text as the token ids were made.

    path: folder or Hub name. Raises ModelError.
    """
    from pocl_ds.data.tokenizer_digest import check_tokenizer
    from pocl_ds.models.load import load_tokenizer

    def load() -> Any:
        return load_tokenizer(
            path, trust_remote_code=source.trust_remote_code, revision=source.revision
        )

    own_template = owner == "student" or recipe.teacher_template == "own"
    check_tokenizer(run, load, owner, own_template=own_template)


def run_init_student(
    recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest
) -> None:
    """Download, prune and heal the student."""
    from pocl_ds.training.init_student import init_student

    student, teacher = _checked_models(recipe, run)
    init_student(
        run,
        student=student,
        teacher=teacher,
        train=recipe.train,
        loss=recipe.loss,
        seed=recipe.seed,
        fingerprint=fingerprint,
    )


def run_cache_teacher(
    recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest
) -> None:
    """Cache the teachers' outputs, or move such a cache. Raises RecipeError for an online teacher,
    ArtifactError if the plan is needed and missing.
    """
    from pocl_ds.models.load import resolve_model
    from pocl_ds.teachers.cache_step import cache_teacher
    from pocl_ds.workflow.cache_transfer import transfer_cache
    from pocl_ds.workflow.steps import cached_model_fingerprints
    from pocl_ds.workflow.teacher_usage import teacher_usage

    if recipe.teacher and recipe.teacher.mode == "auto" and recipe.teacher.routes_field:
        raise RecipeError(
            f"recipe field teacher.mode=auto is online with {recipe.teacher.routes_field}: there "
            "is nothing to cache; set it to cached_hidden_states for a cache"
        )
    if recipe.teacher is None or not caches_teacher(recipe):
        raise RecipeError(
            "recipe field teacher.mode is online: an online teacher is not cached; set it to "
            "cached_hidden_states, cached_topk, cached_sampled or auto"
        )
    student, teacher = _checked_models(recipe, run)
    assert teacher is not None
    check_tokenizer_of(recipe, run, resolve_model(student), student)
    if request.moves_files:
        transfer_cache(recipe, run, student, teacher, fingerprint, request)
        return
    cache_teacher(
        run,
        teacher=teacher,
        student=student,
        config=recipe.teacher_cache,
        usage=teacher_usage(recipe, run),
        seed=recipe.seed,
        fingerprint=fingerprint,
        model_fingerprints=cached_model_fingerprints(recipe),
        shard=request.shard_index,
    )


def run_generate_teacher(
    recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest
) -> None:
    """Generate the teacher's responses. Raises RecipeError if the policy does not use them."""
    from pocl_ds.generation.teacher_responses import generate_teacher_responses
    from pocl_ds.models.load import resolve_model

    if recipe.teacher is None or not recipe.policy.uses_teacher_responses:
        raise RecipeError(
            f"recipe field policy.name is {recipe.policy.name}: only seqkd and mixture train on "
            "the teacher's responses"
        )
    student, teacher = _checked_models(recipe, run)
    check_tokenizer_of(recipe, run, resolve_model(student), student)
    if teacher:
        check_tokenizer_of(recipe, run, resolve_model(teacher), teacher, "teacher")
    generate_teacher_responses(
        run,
        teacher=teacher or recipe.teacher,
        student=student,
        prompt=recipe.prompt,
        template=recipe.teacher_template,
        special_tokens_in_text=recipe.data.special_tokens_in_text,
        policy=recipe.policy,
        generation=recipe.score.generation,
        seed=recipe.seed,
        fingerprint=fingerprint,
        threads=recipe.launch.threads_per_rank,
    )


def run_score(recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest) -> None:
    """Score the samples, or one shard of them."""
    from pocl_ds.difficulty.score import score_training_samples
    from pocl_ds.workflow.run_dir import read_models

    student_path = read_models(run)["student"]
    _checked_models(recipe, run)
    check_tokenizer_of(recipe, run, student_path, recipe.student)
    score_training_samples(
        run,
        recipe.score,
        recipe.prompt,
        model_path=student_path,
        fingerprint=fingerprint,
        shard=request.shard_index,
        threads=recipe.launch.threads_per_rank,
        trust_remote_code=recipe.student.trust_remote_code,
    )


def run_rank(recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest) -> None:
    """Rank the samples by their scores."""
    from pocl_ds.difficulty.rank import write_ranking

    write_ranking(run, recipe.ranking, seed=recipe.seed, fingerprint=fingerprint)


def run_plan(recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest) -> None:
    """Write the plan of the curriculum."""
    from pocl_ds.curriculum.plan_step import write_plan

    write_plan(
        run,
        recipe.curriculum,
        batch_size=recipe.train.batch_size,
        seed=recipe.seed,
        fingerprint=fingerprint,
    )


def run_train(recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest) -> None:
    """Train by the curriculum."""
    _train(recipe, run, fingerprint, baseline=False)


def run_baseline(recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest) -> None:
    """Train the baseline. Raises RecipeError if the recipe does not enable it."""
    if not recipe.baseline.enabled:
        raise RecipeError(
            "recipe field baseline.enabled is false: set it to true to train the baseline"
        )
    _train(recipe, run, fingerprint, baseline=True)


def _train(recipe: Recipe, run: RunDirectory, fingerprint: str, *, baseline: bool) -> None:
    from pocl_ds.training.run_training import train_student
    from pocl_ds.workflow.cache_transfer import cache_reference
    from pocl_ds.workflow.run_dir import read_models

    models, teacher = read_models(run), recipe.local_teacher
    check_tokenizer_of(recipe, run, models["student"], recipe.student)
    if teacher:
        check_tokenizer_of(recipe, run, models["teacher"], teacher, "teacher")
        if teacher.mode == "auto" and teacher.routes_field:
            log.info("teacher.mode=auto selects online: %s is set", teacher.routes_field)
    train_student(
        run,
        teacher_cache=cache_reference(recipe),
        student=recipe.student,
        teacher=teacher,
        loss=recipe.loss,
        train=recipe.train,
        seed=recipe.seed,
        policy=recipe.policy,
        prompt=recipe.prompt,
        curriculum=recipe.curriculum,
        baseline=recipe.baseline if baseline else None,
        fingerprint=fingerprint,
        float32_weights=recipe.export.dtype == "float32" and not baseline,
    )


def run_export(recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest) -> None:
    """Export the student and print where to.

    An export before the evaluation is unfinished: after the evaluation it gets its results.
    """
    from pocl_ds.config.recipe_file import dump_recipe
    from pocl_ds.evaluation.export import export
    from pocl_ds.workflow import manifest
    from pocl_ds.workflow.steps import fingerprints

    evaluation = fingerprints(recipe)["evaluate"]
    if manifest.finished_manifest(run.evaluation, evaluation) is None:
        fingerprint = manifest.fingerprint([fingerprint, "not evaluated"])

    folder = export(
        run,
        out=request.out,
        recipe_yaml=dump_recipe(recipe),
        fingerprint=fingerprint,
        config=recipe.export,
        trust_remote_code=recipe.student.trust_remote_code,
    )
    print(f"student  {folder}")


def run_report(recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest) -> None:
    """Write the report and print where it is."""
    from pocl_ds.config.recipe_file import dump_recipe
    from pocl_ds.report.build import build_report

    build_report(run, recipe.report, recipe_yaml=dump_recipe(recipe), fingerprint=fingerprint)
    print(f"report   {run.report / 'report.html'}")
