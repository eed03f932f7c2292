"""What can be checked before jobs wait in the queue: the files that a recipe names, the run
directory, and SLURM's limits. `pocl submit`, `--dry-run` and `--test-only` make the same checks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from pocl_ds.cluster import scheduler
from pocl_ds.cluster.container_checks import check_container
from pocl_ds.cluster.job_graph import JobSpec
from pocl_ds.cluster.job_options import UNLIMITED, job_limits, parse_memory, parse_time
from pocl_ds.cluster.profile import JobLimits
from pocl_ds.cluster.recipe_inputs import data_sections, named_files
from pocl_ds.cluster.submit import Submission
from pocl_ds.config import Recipe
from pocl_ds.data.source_files import source_files
from pocl_ds.errors import RecipeError, ResourceError
from pocl_ds.models.load import resolve_model
from pocl_ds.workflow.run_setup import check_recipe_fits

log = logging.getLogger("pocl_ds")


def check_submission(submission: Submission) -> None:
    """Check a submission, and warn of limits that SLURM may enforce.

    Raises RecipeError, DataError or ModelError for a file that is missing or an array that is too
    large, ArtifactError if the run directory has results of another recipe.
    """
    if not submission.jobs:
        return
    check_recipe_fits(submission.run, submission.recipe, runs_here=submission.runs_here)
    unfinished = {step for job in submission.jobs for step in job.steps}
    check_inputs(submission.recipe, reads_data="preprocess" in unfinished)
    mounted = (submission.path, Path(submission.directory))
    check_container(submission.profile, submission.recipe, mounted, os.environ)
    if "init-student" in unfinished:
        check_caches(submission.recipe, submission.profile.environment)
    if overriding := sorted(name for name in os.environ if name.startswith("SBATCH_")):
        log.warning(
            "%s of this shell would override the profile, and is ignored", ", ".join(overriding)
        )
    if not scheduler.available():
        return
    try:
        largest = scheduler.max_array_size()
    except ResourceError as error:  # a submission will fail, but not its dry run
        log.warning("SLURM's limits are not checked: %s", error)
        return
    partitions: dict[str | None, dict[str, str]] = {}
    for job in submission.jobs:
        if largest is not None and len(job.array) > largest:
            raise RecipeError(
                f"job {job.name} is an array of {len(job.array)} tasks, and this cluster allows "
                f"{largest} (MaxArraySize): lower score.shards, teacher_cache.shards, or the "
                "number of evaluate.seeds and benchmarks"
            )
        limits = job_limits(submission.profile, job)
        if limits.partition not in partitions:
            partitions[limits.partition] = scheduler.partition(limits.partition)
        _warn_of_limits(job, limits, partitions[limits.partition])


def check_inputs(recipe: Recipe, *, reads_data: bool) -> None:
    """Check that the models, data and templates that the recipe names are here, as far as they are
    files. reads_data: whether data are still to be read. Raises RecipeError, DataError or
    ModelError.
    """
    for source in recipe.local_models:
        resolve_model(source)
    if reads_data:
        for field, section in data_sections(recipe).items():
            source_files(section.source, section.hub_split, setting=field)
    for field, name in named_files(recipe).items():
        if not Path(name).expanduser().exists():
            raise RecipeError(f"recipe field {field}: {name} does not exist here: correct the path")


def check_caches(recipe: Recipe, environment: Mapping[str, str]) -> None:
    """Check that models of the Hub are in the cache that jobs without a network read.

    environment: of the jobs. Raises RecipeError.
    """
    if environment.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return
    from huggingface_hub import try_to_load_from_cache

    home = environment.get("HF_HOME") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(environment.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    for source in recipe.local_models:
        path = resolve_model(source)
        if os.path.isdir(path):
            continue
        file = try_to_load_from_cache(path, "config.json", cache, source.revision)
        if not isinstance(file, str):
            raise RecipeError(
                f"the profile sets HF_HUB_OFFLINE, and {cache} does not have {source.label}: run "
                f"`HF_HOME={home} pocl fetch` with this recipe first"
            )


def _warn_of_limits(job: JobSpec, limits: JobLimits, partition: Mapping[str, str]) -> None:
    """Warn if a job asks for more than its partition allows; a QOS may allow more.

    limits: the options of the job. partition: its fields; empty if they are not known.
    """
    if not partition:
        return
    # Option -> its text, its value, and the partition's field with the limit.
    requests = {
        "time": (limits.time, parse_time(limits.time), "MaxTime"),
        "nodes": (job.nodes, job.nodes, "MaxNodes"),
        "memory": (limits.memory, parse_memory(limits.memory), "MaxMemPerNode"),
    }
    for option, (text, value, field) in requests.items():
        maximum = partition.get(field)
        limit = parse_time(maximum or "UNLIMITED") if option == "time" else _number(maximum)
        if value > limit:
            log.warning(
                "job %s asks for %s=%s, and partition %s allows %s: SLURM may refuse it, or never "
                "start it",
                job.name,
                option,
                text,
                partition["PartitionName"],
                maximum,
            )


def _number(text: str | None) -> float:
    return float(text) if text and text.isdigit() else UNLIMITED
