"""Running the steps in order: which are finished, and how an unfinished one runs.

`pocl run` runs the table of steps from top to bottom. Steps that need ranks go through
launch/train.sh, the others are forked from a process that has imported torch. An evaluation with
vLLM runs one process for the students, which share an engine, and one for the teacher.
"""

from __future__ import annotations

import logging
import os
import time

from pocl_ds.config import Recipe
from pocl_ds.errors import RecipeError
from pocl_ds.evaluation.benchmarks import skip_empty_test_split
from pocl_ds.resources import LAUNCHER, module_command
from pocl_ds.runtime.job_roles import split_ranks
from pocl_ds.runtime.logs import log_to_file
from pocl_ds.runtime.visible_gpus import gpu_variables, visible_gpus
from pocl_ds.workflow.checks import check_sample_counts, check_world_size
from pocl_ds.workflow.finished import finished_steps
from pocl_ds.workflow.fork_server import ForkServer
from pocl_ds.workflow.processes import run_process, run_processes
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import lock_run_directory, record_recipe
from pocl_ds.workflow.step_inputs import engine_groups, engine_needs_own_process
from pocl_ds.workflow.steps import STEP, STEP_NAMES, StepRequest, enabled_steps, fingerprints
from pocl_ds.workflow.verify import check_inputs

log = logging.getLogger("pocl_ds")

# Steps that do not depend on the size of the data, or that count it themselves.
UNCHECKED_STEPS = ("preprocess", "evaluate", "export", "report")
COMMAND = "pocl_ds.cli.main"
SIGNAL_CODES = 128  # exit codes from here on: a signal ended the step


def run_pipeline(
    recipe: Recipe,
    run: RunDirectory,
    server: ForkServer,
    *,
    until: str = STEP_NAMES[-1],
) -> int:
    """Run every unfinished step in order, up to and including `until`. Returns 0, or the exit code
    of the step that failed; that step logs why.

    server: runs what needs no ranks; several runs may share it. Raises PoclError if the run
    directory belongs to another recipe or another process.
    """
    with lock_run_directory(run), log_to_file(run.logs / "run.log"):
        record_recipe(run, recipe)
        finished = finished_steps(run, recipe, checksums=True)
        steps = enabled_steps(recipe, until)
        for step in steps:
            if finished[step.name]:
                log.info("%s: already finished", step.name)
                if step.name == "preprocess" and not finished["evaluate"]:
                    skip_empty_test_split(run, recipe.evaluate)  # warns
                continue
            start = time.monotonic()
            if code := run_step(step.name, run, recipe, server):
                if step.name == "evaluate" and STEP["export"] in steps and code < SIGNAL_CODES:
                    _export_unevaluated(run, recipe, server)
                return code
            log.info("%s: finished in %.0f s", step.name, time.monotonic() - start)
    return 0


def _export_unevaluated(run: RunDirectory, recipe: Recipe, server: ForkServer) -> None:
    """Export the student although its evaluation failed. The next `pocl run` repeats both."""
    log.warning(
        "the evaluation failed: exporting the student without its results; once the evaluation "
        "works, `pocl run --run-dir %s` repeats both",
        run.path,
    )
    run_step("export", run, recipe, server)


def run_in_process(
    name: str, recipe: Recipe, run: RunDirectory, request: StepRequest | None = None
) -> None:
    """Run one step, or the requested part of it, in this process: alone, or as one of its ranks."""
    # The other ranks wait for the first one.
    if os.environ.get("RANK", "0") == "0":
        check_inputs(run, recipe, name)
    if name not in UNCHECKED_STEPS:
        check_sample_counts(run, recipe)
    STEP[name].run(recipe, run, fingerprints(recipe)[name], request or StepRequest())
    if name == "preprocess":
        check_sample_counts(run, recipe)
        skip_empty_test_split(run, recipe.evaluate)  # warns


def run_rank(name: str, recipe: Recipe, run: RunDirectory, request: StepRequest) -> None:
    """Run this process's part of a step that several ranks run: the student's, or the teacher on
    its own ranks. Raises RecipeError if the launcher started more or fewer ranks than the recipe
    has.
    """
    if STEP[name].needs_ranks(recipe):
        check_world_size(recipe)
    if not recipe.teacher_ranks or not STEP[name].needs_ranks(recipe):
        return run_in_process(name, recipe, run, request)
    from pocl_ds.training.remote_loading import teacher_connection
    from pocl_ds.training.teacher_ranks import serve_teacher

    roles = split_ranks(recipe.teacher_ranks)
    if roles.is_teacher:
        return serve_teacher(roles)
    with teacher_connection(roles):
        return run_in_process(name, recipe, run, request)


def run_step(
    name: str,
    run: RunDirectory,
    recipe: Recipe,
    server: ForkServer,
    *,
    shard: tuple[int, int] | None = None,
) -> int:
    """Run one step to its end in separate processes. Returns the exit code.

    A process that fails logs why.

    server: runs what needs no ranks. shard: (I, N) for only shard I of N.
    """
    arguments = [name, "--run-dir", str(run.path)]
    if shard is not None:
        arguments += ["--shard", f"{shard[0]}/{shard[1]}"]

    # launch/train.sh starts the ranks.
    if STEP[name].needs_ranks(recipe):
        launcher = ["bash", str(LAUNCHER), "--ranks", str(recipe.total_ranks)]
        if recipe.launch.threads_per_rank:
            launcher += ["--threads", str(recipe.launch.threads_per_rank)]
        return run_process([*launcher, *arguments])

    # Engines generate the answers of the models first, then the step itself collects them.
    imports = STEP[name].imports(recipe)
    if (
        name == "evaluate"
        and engine_needs_own_process(recipe)
        and skip_empty_test_split(run, recipe.evaluate, warn=False).benchmarks
    ):
        for models in engine_groups(recipe):
            words = [*arguments, "--model", ",".join(models)]
            if recipe.evaluate.data_parallel_size > 1:
                code = _run_engines([*module_command(COMMAND), *words], recipe)
            else:
                code = server.run(COMMAND, words, imports)
            if code:
                return code
    return server.run(COMMAND, arguments, imports)


def _run_engines(command: list[str], recipe: Recipe) -> int:
    """Generate one model's answers with evaluate.data_parallel_size engines in parallel, each on
    its own GPUs, or on its share of the cores.
    """
    count = recipe.evaluate.data_parallel_size
    gpus = recipe.evaluate.generation.tensor_parallel_size
    import torch

    # The visible GPUs must suffice for all engines.
    visible = visible_gpus(torch.cuda.device_count())
    if torch.cuda.is_available() and len(visible) < count * gpus:
        raise RecipeError(
            f"evaluate.data_parallel_size={count} with tensor_parallel_size={gpus} needs "
            f"{count * gpus} GPUs, and {len(visible)} are visible: lower it"
        )

    # Give each engine its own GPUs, or its share of the cores.
    commands, environments = [], []
    for number in range(count):
        commands.append([*command, "--shard", f"{number}/{count}"])
        if torch.cuda.is_available():
            devices = visible[number * gpus : (number + 1) * gpus]
            environments.append(gpu_variables(",".join(devices)))
        else:
            cores = max((os.cpu_count() or 1) // count, 1)
            environments.append({"OMP_NUM_THREADS": str(cores)})
    return run_processes(commands, environments)
