"""The SLURM jobs of a run, derived from the table of workflow steps: which steps each job runs, on
how many nodes and tasks, and after which other jobs. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pocl_ds.cluster.profile import Profile
from pocl_ds.config import Recipe
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.steps import STEPS, JobShape, Step


@dataclass(frozen=True)
class JobCommand:
    """One `pocl` command of a job, without --run-dir."""

    arguments: tuple[str, ...]
    ranks: bool = False  # whether all tasks of the job run it, or only one


@dataclass(frozen=True)
class JobSpec:
    """One SLURM job, whose commands run in order. Each task of an array runs them with its own
    arguments appended to the last command.
    """

    name: str
    steps: tuple[str, ...]  # steps of the workflow that are finished when the job is
    commands: tuple[JobCommand, ...]
    after: tuple[str, ...] = ()
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    array: tuple[tuple[str, ...], ...] = ()  # arguments of each task; empty for a plain job
    whole_nodes: bool = False  # requests the profile's memory of a node

    @property
    def tasks(self) -> int:
        """Number of ranks of its widest command."""
        return self.nodes * self.tasks_per_node


def nodes_for(recipe: Recipe, profile: Profile, nodes: int | None) -> tuple[int, int]:
    """Number of nodes, and of tasks on each, for the jobs that train.

    nodes: as requested; None uses as many as launch.ranks and the teacher's own ranks fill. Raises
    RecipeError if these do not fill whole nodes.
    """
    if nodes is not None:
        return nodes, profile.ranks
    ranks, names = recipe.total_ranks, f"launch.ranks={recipe.launch.ranks}"
    if recipe.teacher_ranks:
        names += f" + teacher.ranks={recipe.teacher_ranks}"
    if ranks <= profile.ranks:
        return 1, ranks
    if ranks % profile.ranks:
        raise RecipeError(
            f"{names} does not fill whole nodes of {profile.ranks} ranks (profile "
            f"{profile.name}): use a multiple, or give --nodes"
        )
    return ranks // profile.ranks, profile.ranks


def pipeline_jobs(
    recipe: Recipe, profile: Profile, finished: Mapping[str, bool], *, nodes: int, tasks: int
) -> list[JobSpec]:
    """The jobs of a run's unfinished steps, in order.

    finished: by step. nodes, tasks: number of nodes of the jobs that train, and of tasks on each.
    """
    jobs = {job.name: job for job in _all_jobs(recipe, profile, finished, nodes, tasks)}
    names = [name for name, job in jobs.items() if job.commands]
    return [_without_skipped(jobs[name], names, jobs) for name in names]


def _all_jobs(
    recipe: Recipe, profile: Profile, finished: Mapping[str, bool], nodes: int, tasks: int
) -> list[JobSpec]:
    """Every job of the table; a job whose steps are all finished has no commands."""
    threads = recipe.launch.threads_per_rank
    rank_resources: dict[str, Any] = {
        "nodes": nodes,
        "tasks_per_node": tasks,
        "gpus_per_node": min(tasks, profile.gpus_per_node),
        "whole_nodes": True,
        "cpus_per_task": threads or max(profile.cpus_per_node // max(tasks, profile.ranks), 1),
    }
    job_of = {step.name: step.job.name for step in STEPS}
    jobs = []
    for name, members in _steps_by_job().items():
        pending = [s for s, _ in members if s.enabled(recipe) and not finished[s.name]]
        shape = members[0][1]
        is_parts_job = shape is members[0][0].parts_job
        on_ranks = [not is_parts_job and step.needs_ranks(recipe) for step in pending]
        dependencies = [
            job_of[dependency]
            for step, _ in members
            for dependency in (*step.dependencies_of(recipe), *step.waits_for)
        ]
        # The parts of a step are computed before the job that collects them.
        if not is_parts_job:
            dependencies += [step.parts_job.name for step, _ in members if step.parts_job]
        jobs.append(
            JobSpec(
                name,
                () if is_parts_job else tuple(step.name for step, _ in members),
                tuple(JobCommand((s.name,), r) for s, r in zip(pending, on_ranks, strict=True)),
                tuple(dict.fromkeys(job for job in dependencies if job != name)),
                array=shape.array(recipe) if shape.array else (),
                **(rank_resources if any(on_ranks) else _on_one_node(profile, shape.gpus(recipe))),
            )
        )
    return jobs


def _steps_by_job() -> dict[str, list[tuple[Step, JobShape]]]:
    """Job name -> its steps and their shapes, in the order of the table."""
    members: dict[str, list[tuple[Step, JobShape]]] = {}
    for step in STEPS:
        for shape in (step.parts_job, step.job):
            if shape is not None:
                members.setdefault(shape.name, []).append((step, shape))
    return members


def _without_skipped(job: JobSpec, names: list[str], jobs: Mapping[str, JobSpec]) -> JobSpec:
    """The job with dependencies only on jobs that run: a skipped job is replaced by its own
    dependencies, and a dependency that another one implies is left out.
    """
    running: list[str] = []
    pending = list(job.after)
    while pending:
        name = pending.pop(0)
        if name in names:
            running.append(name)
        else:
            pending += jobs[name].after
    implied = {name for other in running for name in _ancestors(other, jobs)}
    return replace(job, after=tuple(name for name in dict.fromkeys(running) if name not in implied))


def _ancestors(name: str, jobs: Mapping[str, JobSpec]) -> set[str]:
    """All jobs that one comes after, directly or not."""
    return {
        ancestor for parent in jobs[name].after for ancestor in (parent, *_ancestors(parent, jobs))
    }


def _on_one_node(profile: Profile, gpus: int) -> dict[str, Any]:
    """Resources of a job of one task: its GPUs, and their share of a node's cores."""
    if not gpus:
        return {}
    if not profile.gpus_per_node:
        return {"cpus_per_task": max(profile.cpus_per_node // profile.ranks, 1)}
    return {
        "cpus_per_task": max(gpus * profile.cpus_per_node // profile.gpus_per_node, 1),
        "gpus_per_node": gpus,
    }
