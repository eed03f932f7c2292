"""The table of workflow steps, from which the command line, the pipeline, SLURM jobs, status and
studies derive theirs.

To add a step, add one row to STEPS and its folder to `run_dir.STEP_FOLDERS`. This module imports
nothing heavy, so that `pocl --help` stays fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_ds.errors import RecipeError, did_you_mean
from pocl_ds.workflow import evaluate_step, preprocess_step, step_functions, step_inputs

if TYPE_CHECKING:
    from pocl_ds.config import GenerationConfig, Recipe
    from pocl_ds.workflow.run_dir import RunDirectory

Arguments = tuple[tuple[str, ...], ...]  # command-line arguments of each task of a job array


def _always(_recipe: Recipe) -> bool:
    return True


def _never(_recipe: Recipe) -> bool:
    return False


def _none(_recipe: Recipe) -> tuple[str, ...]:
    return ()


def _models(_recipe: Recipe) -> tuple[str, ...]:
    return ("models",)


def _engine(config: GenerationConfig) -> tuple[str, ...]:
    return ("vllm",) if config.backend == "vllm" else ("models",)


def _one_gpu(_recipe: Recipe) -> int:
    return 1


def _no_gpu(_recipe: Recipe) -> int:
    return 0


@dataclass(frozen=True)
class StepRequest:
    """What a command line adds to the recipe: which part of a step's work to do, and where its
    result goes. By default all of it, in the run directory.
    """

    shard: tuple[int, int] | None = None  # (I, N), from 0: score, cache-teacher and evaluate
    model: tuple[str, ...] = ()  # evaluate: only the answers of these models
    benchmark: str | None = None  # with `model`: only this benchmark
    seed: int | None = None  # with `model`: only this seed
    out: Path | None = None  # export: in place of the run directory's export/
    # cache-teacher: write the finished cache to a folder, or read it from one
    export_to: Path | None = None
    import_from: Path | None = None

    @property
    def moves_files(self) -> bool:
        """Whether the step only copies results, for which one process is enough."""
        return bool(self.export_to or self.import_from)

    @property
    def shard_index(self) -> int | None:
        """The index I of the shard, for steps whose recipe has the number of shards."""
        return None if self.shard is None else self.shard[0]


@dataclass(frozen=True)
class JobShape:
    """The SLURM job that runs a step. Steps that share a job name run in one job, in order.

    A step that needs ranks spans the profile's nodes; any other gets `gpus(recipe)` GPUs of one
    node. With `array`, the job is an array of one task for each tuple of arguments.
    """

    name: str
    gpus: Callable[[Recipe], int] = _one_gpu
    array: Callable[[Recipe], Arguments] | None = None


@dataclass(frozen=True)
class Step:
    """One step of the workflow, which is also a command of `pocl`."""

    name: str
    summary: str  # help text: a sentence in the imperative
    example: str  # a command line
    run: Callable[[Recipe, RunDirectory, str, StepRequest], None]
    inputs: Callable[[Recipe], Any]  # plain values of the recipe that its result depends on
    job: JobShape
    dependencies: tuple[str, ...] = ()  # steps whose results enter its fingerprint
    # Those that are further dependencies with some recipes.
    further_dependencies: Callable[[Recipe], tuple[str, ...]] = _none
    # Steps that run before it and do not change its result, so that they stay out of its
    # fingerprint.
    waits_for: tuple[str, ...] = ()
    enabled: Callable[[Recipe], bool] = _always
    needs_ranks: Callable[[Recipe], bool] = _never  # whether launch.ranks processes run it
    # Names in `shared_imports.SHARED_IMPORTS`: what it imports where one process runs it.
    imports: Callable[[Recipe], tuple[str, ...]] = _none
    # A job array that computes parts of the result before `job` collects them.
    parts_job: JobShape | None = None
    options: tuple[str, ...] = ()  # fields of StepRequest that its command offers
    shards_field: str | None = None  # recipe field that --shard I/N sets to N
    # Its result describes a training: it counts as finished only where the training does, and a
    # changed recipe may replace it.
    describes_training: bool = False
    shareable: bool = True  # whether another cell of a study may reuse its result
    expensive: bool = False  # whether another cell of a study should wait for its result
    out_of_memory_hint: str = "use a machine with more memory"

    def directory(self, run: RunDirectory) -> Path:
        """Where its result is written."""
        return run.step_directory(self.name)

    def dependencies_of(self, recipe: Recipe) -> tuple[str, ...]:
        """All steps whose results enter its fingerprint."""
        return (*self.dependencies, *self.further_dependencies(recipe))


def _shards(count: int) -> Arguments:
    return tuple(("--shard", f"{shard}/{count}") for shard in range(count))


def _answer_parts(recipe: Recipe) -> Arguments:
    """One task for each model, benchmark and seed."""
    return tuple(
        ("--model", model, "--benchmark", benchmark, "--seed", str(seed))
        for model in step_inputs.evaluated_models(recipe)
        for benchmark in recipe.evaluate.benchmarks
        for seed in recipe.evaluate.seeds
    )


def is_teacher_served(recipe: Recipe) -> bool:
    """Whether servers run the teacher, and no rank or GPU of this run."""
    return recipe.teacher is not None and recipe.teacher.endpoint is not None


def _generation_gpus(recipe: Recipe) -> int:
    return recipe.score.generation.tensor_parallel_size


TRAINING_HINT = (
    "lower train.micro_batch_size or loss.chunk_memory_mb, set "
    "student.activation_checkpointing=true, for long samples train.sequence_parallel_size, or use "
    "more GPUs; `pocl estimate` computes how many"
)
GENERATION_HINT = "lower score.generation.max_num_seqs and score.generation.max_num_batched_tokens"

STEPS: tuple[Step, ...] = (
    Step(
        "preprocess",
        summary="Read, split and tokenize the instruction data.",
        example="pocl preprocess my.yaml --run-dir runs/x data.source=my.jsonl",
        run=preprocess_step.run_preprocess,
        inputs=step_inputs.preprocess_inputs,
        imports=_models,
        job=JobShape("init-student"),
    ),
    Step(
        "init-student",
        summary="Create the initial student: download, prune and heal it.",
        example="pocl init-student --run-dir runs/x",
        run=step_functions.run_init_student,
        inputs=step_inputs.init_student_inputs,
        imports=_models,
        job=JobShape("init-student"),
        dependencies=("preprocess",),
        needs_ranks=lambda recipe: recipe.student.heal_steps > 0,
        expensive=True,
        out_of_memory_hint=TRAINING_HINT,
    ),
    Step(
        "generate-teacher",
        summary="Generate the teacher's response to every training prompt (SeqKD, mixtures).",
        example="pocl generate-teacher --run-dir runs/x",
        run=step_functions.run_generate_teacher,
        inputs=step_inputs.generate_teacher_inputs,
        imports=lambda recipe: _engine(recipe.score.generation),
        job=JobShape(
            "generate-teacher",
            gpus=lambda recipe: 0 if is_teacher_served(recipe) else _generation_gpus(recipe),
        ),
        dependencies=("preprocess",),
        enabled=lambda recipe: recipe.policy.uses_teacher_responses,
        expensive=True,
        out_of_memory_hint=GENERATION_HINT,
    ),
    Step(
        "score",
        summary="Score the difficulty of every sample: the student's ROUGE-L and cross-entropy.",
        example="pocl score --run-dir runs/x --shard 2/8",
        run=step_functions.run_score,
        inputs=step_inputs.score_inputs,
        imports=lambda recipe: _engine(recipe.score.generation),
        job=JobShape(
            "score", gpus=_generation_gpus, array=lambda recipe: _shards(recipe.score.shards)
        ),
        dependencies=("preprocess", "init-student"),
        enabled=lambda recipe: recipe.scores_samples,
        options=("shard",),
        shards_field="score.shards",
        expensive=True,
        out_of_memory_hint=GENERATION_HINT,
    ),
    Step(
        "rank",
        summary="Rank the samples from easy to hard.",
        example="pocl rank --run-dir runs/x",
        run=step_functions.run_rank,
        inputs=step_inputs.rank_inputs,
        job=JobShape("plan", gpus=_no_gpu),
        dependencies=("preprocess", "score"),
    ),
    Step(
        "plan",
        summary="Divide the ranking into the stages of the curriculum.",
        example="pocl plan --run-dir runs/x",
        run=step_functions.run_plan,
        inputs=step_inputs.plan_inputs,
        job=JobShape("plan", gpus=_no_gpu),
        dependencies=("rank",),
    ),
    Step(
        "cache-teacher",
        summary="Run the teacher once over the training set and cache its outputs.",
        example="pocl cache-teacher --run-dir runs/x --shard 0/4",
        run=step_functions.run_cache_teacher,
        inputs=step_inputs.cache_teacher_inputs,
        job=JobShape(
            "cache-teacher",
            gpus=lambda recipe: 0 if is_teacher_served(recipe) else 1,
            array=lambda recipe: _shards(recipe.teacher_cache.shards),
        ),
        dependencies=("preprocess",),
        further_dependencies=step_inputs.cache_teacher_dependencies,
        enabled=step_inputs.caches_teacher,
        needs_ranks=lambda recipe: not is_teacher_served(recipe),
        options=("shard", "export_to", "import_from"),
        shards_field="teacher_cache.shards",
        expensive=True,
        out_of_memory_hint="lower teacher_cache.max_batch_tokens, or shard the teacher with "
        "teacher.ds_config",
    ),
    Step(
        "train",
        summary="Train the student by the curriculum; continue from the last checkpoint.",
        example="pocl train --run-dir runs/x",
        run=step_functions.run_train,
        inputs=step_inputs.train_inputs,
        job=JobShape("train"),
        dependencies=("init-student", "plan", "generate-teacher"),
        waits_for=("cache-teacher",),
        needs_ranks=_always,
        shareable=False,
        out_of_memory_hint=TRAINING_HINT,
    ),
    Step(
        "baseline",
        summary="Train a plain KD baseline on as many sample visits, for comparison.",
        example="pocl baseline --run-dir runs/x baseline.enabled=true",
        run=step_functions.run_baseline,
        inputs=step_inputs.baseline_inputs,
        job=JobShape("baseline"),
        dependencies=("init-student", "plan", "generate-teacher"),
        waits_for=("cache-teacher",),
        enabled=lambda recipe: recipe.baseline.enabled,
        needs_ranks=_always,
        expensive=True,
        out_of_memory_hint=TRAINING_HINT,
    ),
    Step(
        "evaluate",
        summary="Generate answers to the benchmarks and score them.",
        example="pocl evaluate --run-dir runs/x --model student",
        run=evaluate_step.run_evaluate,
        inputs=step_inputs.evaluate_inputs,
        imports=lambda recipe: _engine(recipe.evaluate.generation),
        job=JobShape("report"),
        dependencies=("train", "baseline"),
        parts_job=JobShape(
            "evaluate",
            gpus=lambda recipe: recipe.evaluate.generation.tensor_parallel_size,
            array=_answer_parts,
        ),
        options=("shard", "model", "benchmark", "seed"),
        describes_training=True,
        shareable=False,
        out_of_memory_hint="lower evaluate.generation.max_num_seqs and max_num_batched_tokens; "
        "the held-out loss needs each model on one GPU, and evaluate.held_out_loss=false skips it",
    ),
    Step(
        "export",
        summary="Write the student as a Hugging Face folder with a model card.",
        example="pocl export --run-dir runs/x --out my-student",
        run=step_functions.run_export,
        inputs=step_inputs.export_inputs,
        imports=_models,
        job=JobShape("report"),
        dependencies=("evaluate",),
        options=("out",),
        describes_training=True,
        shareable=False,
    ),
    Step(
        "report",
        summary="Write an HTML report for one run, or a comparison of several.",
        example="pocl report --run-dir runs/a --run-dir runs/b",
        run=step_functions.run_report,
        inputs=step_inputs.report_inputs,
        job=JobShape("report"),
        dependencies=("evaluate",),
        describes_training=True,
        shareable=False,
    ),
)
STEP: dict[str, Step] = {step.name: step for step in STEPS}
STEP_NAMES: tuple[str, ...] = tuple(STEP)
# Names of the SLURM jobs, in the order of their first steps.
JOB_NAMES: tuple[str, ...] = tuple(
    dict.fromkeys(
        job.name for step in STEPS for job in (step.parts_job, step.job) if job is not None
    )
)


def enabled_steps(recipe: Recipe, until: str = STEP_NAMES[-1]) -> tuple[Step, ...]:
    """The steps that a recipe runs, in order, up to and including `until`."""
    return tuple(step for step in STEPS[: STEP_NAMES.index(until) + 1] if step.enabled(recipe))


def check_step_names(names: Mapping[str, str]) -> None:
    """Raise RecipeError if a value names no step. names: by the option that has them."""
    for option, name in names.items():
        if name not in STEP:
            raise RecipeError(
                f"{option} {name}: there is no such step: {did_you_mean(name, STEP_NAMES)}"
            )


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """The fingerprint that each step's result must have to belong to this recipe."""
    from pocl_ds.workflow.manifest import fingerprint

    digests: dict[str, str] = {}
    for step in STEPS:
        upstream = [
            digests[name] for name in step.dependencies_of(recipe) if STEP[name].enabled(recipe)
        ]
        digests[step.name] = fingerprint([step.name, step.inputs(recipe), upstream])
    return digests


def cached_model_fingerprints(recipe: Recipe) -> dict[str, str]:
    """The fingerprint of each teacher's outputs of any sample, by the field of its model."""
    from pocl_ds.workflow.manifest import fingerprint

    data = fingerprints(recipe)["preprocess"]
    return {
        name: fingerprint([data, inputs])
        for name, inputs in step_inputs.cached_model_inputs(recipe).items()
    }
