"""A run as jobs: which stages each holds, on how many nodes and tasks, after which others. Pure:
nothing is asked or sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pocl_ds.cluster.profile import Profile
from pocl_ds.config import Recipe
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.pipeline import STAGES, evaluated_models, needs_ranks


@dataclass(frozen=True)
class Step:
    """One `pocl` command of a job, without --run-dir; `ranks`: on all of the job's tasks, else on
    one.
    """

    words: tuple[str, ...]
    ranks: bool = False


@dataclass(frozen=True)
class JobSpec:
    """One job: its steps run in order. An array runs them once an item, whose words are appended to
    the last step's.
    """

    name: str
    stages: tuple[str, ...]  # of the pipeline, that are done when it is
    steps: tuple[Step, ...]
    after: tuple[str, ...] = ()
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    items: tuple[tuple[str, ...], ...] = ()
    whole_nodes: bool = False  # asks for the profile's memory of a node

    @property
    def tasks(self) -> int:
        """Ranks of its widest step."""
        return self.nodes * self.tasks_per_node


def nodes_for(recipe: Recipe, profile: Profile, nodes: int | None) -> tuple[int, int]:
    """Nodes, and tasks on each, of the jobs that train. Raises RecipeError where launch.ranks does
    not spread evenly.

    nodes: as asked for; None takes as many as launch.ranks fills.
    """
    if nodes is not None:
        return nodes, profile.ranks
    ranks = recipe.launch.ranks
    if ranks <= profile.ranks:
        return 1, ranks
    if ranks % profile.ranks:
        raise RecipeError(
            f"launch.ranks={ranks} does not fill whole nodes of {profile.ranks} ranks (profile "
            f"{profile.name}): "
            "take a multiple, or say --nodes"
        )
    return ranks // profile.ranks, profile.ranks


def pipeline_jobs(
    recipe: Recipe, profile: Profile, done: Mapping[str, bool], *, nodes: int, tasks: int
) -> list[JobSpec]:
    """The jobs of a run, in order, without stages that are done already.

    done: by stage. nodes, tasks: of the jobs that train, tasks on each node.
    """
    threads = recipe.launch.threads_per_rank
    wide: dict[str, Any] = {
        "nodes": nodes,
        "tasks_per_node": tasks,
        "gpus_per_node": min(tasks, profile.gpus_per_node),
        "whole_nodes": True,
        "cpus_per_task": threads or max(profile.cpus_per_node // max(tasks, profile.ranks), 1),
    }
    score_gpus = recipe.score.generation.tensor_parallel_size
    prepare = tuple(
        Step((name,), needs_ranks(name, recipe))
        for name in ("preprocess", "init-student")
        if not done[name]
    )
    jobs = [
        JobSpec(
            "init-student",
            ("preprocess", "init-student"),
            prepare,
            (),
            **(wide if any(step.ranks for step in prepare) else _one(profile)),
        ),
        JobSpec(
            "cache-teacher",
            ("cache-teacher",),
            (Step(("cache-teacher",), True),),
            ("init-student",),
            items=_pieces(recipe.teacher_cache.shards),
            **wide,
        ),
        JobSpec(
            "generate-teacher",
            ("generate-teacher",),
            (Step(("generate-teacher",)),),
            ("init-student",),
            **_one(profile, score_gpus),
        ),
        JobSpec(
            "score",
            ("score",),
            (Step(("score",)),),
            ("init-student",),
            items=_pieces(recipe.score.shards),
            **_one(profile, score_gpus),
        ),
        JobSpec(
            "plan",
            ("rank", "plan"),
            tuple(Step((n,)) for n in ("rank", "plan") if not done[n]),
            ("score",),
        ),
        JobSpec(
            "train",
            ("train",),
            (Step(("train",), True),),
            ("plan", "cache-teacher", "generate-teacher"),
            **wide,
        ),
        JobSpec(
            "baseline",
            ("baseline",),
            (Step(("baseline",), True),),
            ("plan", "cache-teacher", "generate-teacher"),
            **wide,
        ),
        JobSpec(
            "evaluate",
            (),
            (Step(("evaluate",)),),
            ("train", "baseline"),
            items=_answers(recipe),
            **_one(profile, recipe.evaluate.generation.tensor_parallel_size),
        ),
        # `evaluate` on a task's own gathers the answers and measures the held-out loss
        JobSpec(
            "report",
            ("evaluate", "export", "report"),
            tuple(Step((n,)) for n in ("evaluate", "export", "report") if not done[n]),
            ("evaluate",),
            **_one(profile),
        ),
    ]
    stages = {stage.name: stage.wanted(recipe) for stage in STAGES}
    wanted = {
        name: stages[name] for name in ("cache-teacher", "generate-teacher", "score", "baseline")
    } | {"evaluate": not done["evaluate"]}
    kept = [
        job
        for job in jobs
        if wanted.get(job.name, True)
        and not (job.stages and all(done[stage] for stage in job.stages))
    ]
    return [_reconnected(job, kept, {other.name: other for other in jobs}) for job in kept]


def _reconnected(job: JobSpec, kept: list[JobSpec], every: Mapping[str, JobSpec]) -> JobSpec:
    """The job after those of its predecessors that run; one that is left out is replaced by its
    own.
    """
    names, found = {other.name for other in kept}, []
    pending = list(job.after)
    while pending:
        name = pending.pop(0)
        if name in names:
            found.append(name)
        else:
            pending += every[name].after
    before = {name for other in found for name in _ancestors(other, every)}
    return replace(job, after=tuple(name for name in dict.fromkeys(found) if name not in before))


def _ancestors(name: str, every: Mapping[str, JobSpec]) -> set[str]:
    """The jobs that one comes after, and theirs."""
    return {found for other in every[name].after for found in (other, *_ancestors(other, every))}


def _pieces(count: int) -> tuple[tuple[str, ...], ...]:
    return tuple(("--shard", f"{shard}/{count}") for shard in range(count))


def _answers(recipe: Recipe) -> tuple[tuple[str, ...], ...]:
    """One task a model, benchmark and seed."""
    return tuple(
        ("--model", model, "--benchmark", benchmark, "--seed", str(seed))
        for model in evaluated_models(recipe)
        for benchmark in recipe.evaluate.benchmarks
        for seed in recipe.evaluate.seeds
    )


def _one(profile: Profile, gpus: int = 1) -> dict[str, Any]:
    """One task with a GPU, or several that share an engine; its part of a node's cores."""
    if not profile.gpus_per_node:
        return {"cpus_per_task": max(profile.cpus_per_node // profile.ranks, 1)}
    return {
        "cpus_per_task": max(gpus * profile.cpus_per_node // profile.gpus_per_node, 1),
        "gpus_per_node": gpus,
    }
