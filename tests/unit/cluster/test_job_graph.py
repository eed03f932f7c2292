"""The jobs of a run, with their nodes and dependencies."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.cluster.job_graph import JobSpec, nodes_for, pipeline_jobs
from pocl_ds.cluster.profile import check_profile
from pocl_ds.config import Recipe
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.steps import STEP_NAMES, STEPS

GPU = check_profile({"name": "gpu", "gpus_per_node": 4, "cpus_per_node": 64}, "here")


def recipe(**sections: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "x",
        "teacher": {"model": "t"},
        "data": {"source": "documentation"},
        "student": {"model": "s"},
        "score": {"shards": 3},
        "train": {"batch_size": 64, "micro_batch_size": 1},
        "launch": {"ranks": 8},
        "evaluate": {"seeds": [1, 2]},
    }
    return check_recipe({**tree, **sections})


def jobs(recipe: Recipe, **finished: bool) -> dict[str, JobSpec]:
    nodes, tasks = nodes_for(recipe, GPU, None)
    state = {**dict.fromkeys(STEP_NAMES, False), **finished}
    graph = pipeline_jobs(recipe, GPU, state, nodes=nodes, tasks=tasks)
    return {job.name: job for job in graph}


def test_the_jobs_of_a_full_run() -> None:
    graph = jobs(recipe())
    assert {name: job.after for name, job in graph.items()} == {
        "init-student": (),
        "score": ("init-student",),
        "plan": ("score",),
        "train": ("plan",),
        "evaluate": ("train",),
        "report": ("evaluate",),
    }
    train = graph["train"]
    assert (train.nodes, train.tasks_per_node, train.gpus_per_node, train.cpus_per_task) == (
        2,
        4,
        4,
        16,
    )
    assert graph["score"].array[2] == ("--shard", "2/3") and graph["score"].gpus_per_node == 1
    assert len(graph["evaluate"].array) == 3 * 2
    assert graph["evaluate"].array[0] == (
        "--model",
        "teacher",
        "--benchmark",
        "test",
        "--seed",
        "1",
    )
    assert graph["init-student"].tasks == 1 and graph["plan"].gpus_per_node == 0


def test_healing_runs_on_all_ranks() -> None:
    assert jobs(recipe(student={"model": "s", "heal_steps": 3}))["init-student"].tasks == 8


def test_the_evaluation_waits_for_the_baseline() -> None:
    graph = jobs(recipe(baseline={"enabled": True}))
    assert graph["baseline"].after == ("plan",) and graph["evaluate"].after == ("train", "baseline")


def test_the_teacher_is_cached_while_samples_are_scored() -> None:
    graph = jobs(
        recipe(teacher={"model": "t", "mode": "cached_hidden_states"}, teacher_cache={"shards": 4})
    )
    assert (
        graph["cache-teacher"].after == ("init-student",)
        and graph["cache-teacher"].tasks == 8
        and len(graph["cache-teacher"].array) == 4
    )
    assert graph["train"].after == ("plan", "cache-teacher") and "cache-teacher" not in jobs(
        recipe()
    )


def test_teachers_of_stages_are_cached_once_the_stages_are_known() -> None:
    teacher = {"model": "t", "mode": "cached_hidden_states", "by_stage": {2: {"model": "u"}}}
    graph = jobs(recipe(teacher=teacher))
    assert graph["cache-teacher"].after == ("plan",) and graph["train"].after == ("cache-teacher",)


def test_a_random_ranking_needs_no_scores() -> None:
    graph = jobs(recipe(ranking={"strategy": "random"}))
    assert "score" not in graph and graph["plan"].after == ("init-student",)


FINISHED = st.fixed_dictionaries({name: st.booleans() for name in STEP_NAMES})


@given(FINISHED, st.booleans(), st.booleans())
def test_finished_steps_are_skipped_and_jobs_stay_in_order(
    finished: dict[str, bool], baseline: bool, random: bool
) -> None:
    configured = recipe(
        baseline={"enabled": baseline}, ranking={"strategy": "random" if random else "fusion"}
    )
    graph = jobs(configured, **finished)
    names = list(graph)
    covered = [step for job in graph.values() for step in job.steps]
    enabled = {step.name for step in STEPS if step.enabled(configured)}
    assert {name for name in enabled if not finished[name]} <= set(covered) and len(
        set(covered)
    ) == len(covered)
    for place, (name, job) in enumerate(graph.items()):
        assert set(job.after) <= set(names[:place]), "a job depends only on earlier jobs that run"
        assert not job.steps or not all(finished[step] for step in job.steps)
        steps = [command.arguments[0] for command in job.commands]
        assert steps == [s for s in steps if not finished.get(s, False)] or name == "evaluate"


def test_ranks_must_fill_whole_nodes() -> None:
    assert nodes_for(recipe(), GPU, None) == (2, 4)
    assert nodes_for(recipe(launch={"ranks": 2}), GPU, None) == (1, 2)
    assert nodes_for(recipe(), GPU, 5) == (5, 4)
    own = {"model": "t", "placement": "own_ranks", "ranks": 4}
    assert nodes_for(recipe(teacher=own), GPU, None) == (3, 4)
    assert nodes_for(recipe(teacher={**own, "ranks": 2}, launch={"ranks": 2}), GPU, None) == (1, 4)
    with pytest.raises(
        RecipeError, match=r"launch\.ranks=8 \+ teacher\.ranks=3 does not fill whole nodes of 4"
    ):
        nodes_for(recipe(teacher={**own, "ranks": 3}), GPU, None)
    with pytest.raises(RecipeError, match=r"launch.ranks=6 does not fill whole nodes of 4"):
        nodes_for(
            recipe(launch={"ranks": 6}, train={"batch_size": 66, "micro_batch_size": 1}), GPU, None
        )
