"""What the workflow step `evaluate` runs: answers, verification, standard tasks, held-out loss,
judge, and results.

Imports of libraries are inside the functions, as in `step_functions`.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from pocl_ds.errors import PoclError, RecipeError
from pocl_ds.workflow.step_functions import check_tokenizer_of
from pocl_ds.workflow.step_inputs import engine_needs_own_process, evaluated_models

if TYPE_CHECKING:
    from pocl_ds.config import EvaluateConfig, Recipe
    from pocl_ds.generation.reused_generator import ReusedGenerator
    from pocl_ds.workflow.run_dir import RunDirectory
    from pocl_ds.workflow.steps import StepRequest

log = logging.getLogger("pocl_ds")


def _answer_template(recipe: Recipe, run: RunDirectory) -> str | None:
    """The chat template that asks the teacher for answers, as in training; None for its own."""
    from pocl_ds.models.load import load_tokenizer
    from pocl_ds.workflow.run_dir import read_models

    if recipe.teacher_template == "own":
        return None
    path, trust = read_models(run)["student"], recipe.student.trust_remote_code
    template: str | None = load_tokenizer(path, trust_remote_code=trust).chat_template
    return template


def run_evaluate(recipe: Recipe, run: RunDirectory, fingerprint: str, request: StepRequest) -> None:
    """Generate the answers of some models; or, without `request.model`, those of all models that no
    other process generates, verify them, run the standard tasks, measure the held-out loss, run the
    judge, and write the results.
    """
    from pocl_ds.evaluation.benchmarks import skip_empty_test_split
    from pocl_ds.evaluation.evaluate import RESULTS, summarize_results
    from pocl_ds.evaluation.evaluated_models import model_path
    from pocl_ds.evaluation.harness import run_harness
    from pocl_ds.evaluation.held_out_loss import measure_held_out_loss
    from pocl_ds.evaluation.judge import judge_answers
    from pocl_ds.evaluation.verification import check_sandboxed_benchmarks, verify_answers
    from pocl_ds.generation.reused_generator import ReusedGenerator
    from pocl_ds.workflow.input_digests import harness_file_digests
    from pocl_ds.workflow.processes import run_process

    models = evaluated_models(recipe)
    # A message of each model's process would repeat that of the last one.
    config = skip_empty_test_split(
        run,
        _requested_part(recipe.evaluate, request),
        warn=not request.model or request.benchmark is not None,
    )
    check_sandboxed_benchmarks(config)
    trusted = {"initial", "student", "baseline"} if recipe.student.trust_remote_code else set[str]()
    trusted |= {"teacher"} if recipe.teacher and recipe.teacher.trust_remote_code else set()

    own_models = () if engine_needs_own_process(recipe) else models
    with contextlib.closing(ReusedGenerator()) as generators:
        for model in request.model or own_models:
            if config.benchmarks:
                shard, trust = request.shard or (0, 1), model in trusted
                _generate_answers(recipe, run, config, model, shard, generators, trust=trust)
    if request.model:
        return
    verify_answers(run, config, models)
    paths = {name: model_path(run, name) for name in _models_with_weights(recipe, models)}
    run_harness(
        run,
        config,
        paths,
        run_process,
        task_files=harness_file_digests(config.harness),
        trusted=trusted,
    )
    measure_held_out_loss(
        run,
        config,
        recipe.prompt,
        paths,
        teacher=recipe.teacher,
        teacher_template=recipe.teacher_template,
        special_tokens_in_text=recipe.data.special_tokens_in_text,
        threads=recipe.launch.threads_per_rank,
        trusted=trusted,
    )

    # Without the judge's endpoint the other results are still written; the step stays unfinished.
    try:
        judge_answers(run, config, models)
    except PoclError:
        summarize_results(run, config.model_copy(update={"judge": None}), models)
        log.info("evaluate: wrote %s without the judge's verdicts", run.evaluation / RESULTS)
        raise
    summarize_results(run, config, models, fingerprint=fingerprint)


def _models_with_weights(recipe: Recipe, models: list[str]) -> list[str]:
    """The evaluated models without a served teacher, whose distributions are not here."""
    if recipe.teacher is None or recipe.teacher.endpoint is None:
        return models
    log.info(
        "the teacher runs at teacher.endpoint: only the students' loss is measured, without a KL "
        "to the teacher, and only the students run the tasks of evaluate.harness"
    )
    return [model for model in models if model != "teacher"]


def _generate_answers(
    recipe: Recipe,
    run: RunDirectory,
    config: EvaluateConfig,
    model: str,
    shard: tuple[int, int],
    generators: ReusedGenerator,
    *,
    trust: bool,
) -> None:
    """Generate one model's answers, or a shard of them. trust: its own Python code may run."""
    from pocl_ds.evaluation.evaluate import generate_answers
    from pocl_ds.evaluation.evaluated_models import TEACHER, model_path
    from pocl_ds.generation.end_of_turn import recorded_end_ids

    path = model_path(run, model)
    if model == TEACHER and recipe.teacher:
        check_tokenizer_of(recipe, run, path, recipe.teacher, "teacher")
    else:
        check_tokenizer_of(recipe, run, path, recipe.student)
    generate_answers(
        run,
        config,
        recipe.prompt,
        model=model,
        path=path,
        generators=generators,
        special_tokens_in_text=recipe.data.special_tokens_in_text,
        rouge_tokenizer=recipe.score.rouge_tokenizer,
        chat_template=_answer_template(recipe, run) if model == TEACHER else None,
        end_of_turn_ids=() if model == TEACHER else recorded_end_ids(run),
        threads=recipe.launch.threads_per_rank,
        shard=shard,
        trust_remote_code=trust,
        endpoint=recipe.teacher.endpoint if model == TEACHER and recipe.teacher else None,
    )


def _requested_part(config: EvaluateConfig, request: StepRequest) -> EvaluateConfig:
    """The evaluation with only the requested benchmark and seed. Raises RecipeError if the recipe
    lacks one.
    """
    part: dict[str, Any] = {}
    if request.benchmark is not None:
        if request.benchmark not in config.benchmarks:
            raise RecipeError(
                f"--benchmark {request.benchmark}: the recipe has {', '.join(config.benchmarks)}"
            )
        part["benchmarks"] = {request.benchmark: config.benchmarks[request.benchmark]}
    if request.seed is not None:
        if request.seed not in config.seeds:
            raise RecipeError(
                f"--seed {request.seed}: the recipe has {', '.join(map(str, config.seeds))}"
            )
        part["seeds"] = (request.seed,)
    return config.model_copy(update=part)
