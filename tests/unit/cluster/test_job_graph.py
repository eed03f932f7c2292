"""A run as jobs: which there are, how wide, after which; and profiles that say what a cluster asks
for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.cluster.job_graph import JobSpec, nodes_for, pipeline_jobs
from pocl_ds.cluster.profile import check_profile, dump_profile, load_profile
from pocl_ds.config import Recipe
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import RecipeError
from pocl_ds.resources import PROFILES
from pocl_ds.workflow.steps import STEP_NAMES, STEPS

GPU = check_profile({"name": "gpu", "gpus_per_node": 4, "cpus_per_node": 64}, "here")


def recipe(**sections: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "x",
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "score": {"shards": 3},
        "train": {"batch_size": 64, "micro_batch_size": 1},
        "launch": {"ranks": 8},
        "evaluate": {"seeds": [1, 2]},
    }
    return check_recipe({**tree, **sections})


def jobs(of: Recipe, **done: bool) -> dict[str, JobSpec]:
    nodes, tasks = nodes_for(of, GPU, None)
    found = pipeline_jobs(
        of, GPU, {**dict.fromkeys(STEP_NAMES, False), **done}, nodes=nodes, tasks=tasks
    )
    return {job.name: job for job in found}


def test_the_whole_pipeline() -> None:
    found = jobs(recipe())
    assert {name: job.after for name, job in found.array()} == {
        "init-student": (),
        "score": ("init-student",),
        "plan": ("score",),
        "train": ("plan",),
        "evaluate": ("train",),
        "report": ("evaluate",),
    }
    train = found["train"]
    assert (train.nodes, train.tasks_per_node, train.gpus_per_node, train.cpus_per_task) == (
        2,
        4,
        4,
        16,
    )
    assert found["score"].array[2] == ("--shard", "2/3") and found["score"].gpus_per_node == 1
    assert len(found["evaluate"].array) == 3 * 2
    assert found["evaluate"].array[0] == (
        "--model",
        "teacher",
        "--benchmark",
        "test",
        "--seed",
        "1",
    )
    assert found["init-student"].tasks == 1 and found["plan"].gpus_per_node == 0


def test_healing_needs_all_ranks() -> None:
    assert jobs(recipe(student={"model": "s", "heal_steps": 3}))["init-student"].tasks == 8


def test_a_baseline_is_trained_beside_and_awaited() -> None:
    found = jobs(recipe(baseline={"enabled": True}))
    assert found["baseline"].after == ("plan",) and found["evaluate"].after == ("train", "baseline")


def test_a_teacher_that_is_asked_once_is_asked_beside_the_scores() -> None:
    found = jobs(
        recipe(teacher={"model": "t", "mode": "cached_hidden_states"}, teacher_cache={"shards": 4})
    )
    assert (
        found["cache-teacher"].after == ("init-student",)
        and found["cache-teacher"].tasks == 8
        and len(found["cache-teacher"].array) == 4
    )
    assert found["train"].after == ("plan", "cache-teacher") and "cache-teacher" not in jobs(
        recipe()
    )


def test_a_random_order_needs_no_scores() -> None:
    found = jobs(recipe(rank={"strategy": "random"}))
    assert "score" not in found and found["plan"].after == ("init-student",)


STAGES = st.fixed_dictionaries({name: st.booleans() for name in STEP_NAMES})


@given(STAGES, st.booleans(), st.booleans())
def test_what_is_done_is_left_out_and_order_stays(
    done: dict[str, bool], compare: bool, random: bool
) -> None:
    of = recipe(baseline={"enabled": compare}, rank={"strategy": "random" if random else "fusion"})
    found = jobs(of, **done)
    names = list(found)
    covered = [stage for job in found.values() for stage in job.steps]
    wanted = {stage.name for stage in STEPS if stage.enabled(of)}
    assert {name for name in wanted if not done[name]} <= set(covered) and len(set(covered)) == len(
        covered
    )
    for place, (name, job) in enumerate(found.array()):
        assert set(job.after) <= set(names[:place]), "only earlier jobs that run"
        assert not job.steps or not all(done[stage] for stage in job.steps)
        steps = [command.arguments[0] for command in job.commands]
        assert steps == [s for s in steps if not done.get(s, False)] or name == "evaluate"


def test_ranks_fill_nodes() -> None:
    assert nodes_for(recipe(), GPU, None) == (2, 4)
    assert nodes_for(recipe(launch={"ranks": 2}), GPU, None) == (1, 2)
    assert nodes_for(recipe(), GPU, 5) == (5, 4)
    with pytest.raises(RecipeError, match=r"launch.ranks=6 does not fill whole nodes of 4"):
        nodes_for(
            recipe(launch={"ranks": 6}, train={"batch_size": 66, "micro_batch_size": 1}), GPU, None
        )


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles(path: Path) -> None:
    profile = load_profile(path.stem)
    assert check_profile(yaml.safe_load(dump_profile(profile)), "again") == profile


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"partiton": "x"}, ("partiton does not exist", "did you mean partition")),
        ({"partition": "a b; touch x"}, ("partition", "letters, digits")),
        ({"time": "soon"}, ("time='soon'", "D-HH:MM:SS")),
        ({"options": ["-p x"]}, ("options", "letters, digits")),
        ({"options": ["mail"]}, ("--name=value",)),
        ({"gpus_per_node": 2, "ranks_per_node": 3}, ("ranks_per_node=3", "GPU of its own")),
        ({"cpus_per_node": 1, "ranks_per_node": 2}, ("cpus_per_node=1", "a core")),
        ({"environment": {"A B": "x"}}, ("environment",)),
        ({"jobs": {"train": {"tme": "1"}}}, ("jobs.train.tme does not exist", "did you mean time")),
        ({"container": {"runtime": "docker", "image": "x"}}, ("container.runtime",)),
    ],
)
def test_a_profile_that_is_wrong_is_one_sentence(
    fields: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(RecipeError) as found:
        load_profile(str(path))
    assert all(word in str(found.value) for word in words) and "\n" not in str(found.value), (
        found.value
    )


def test_a_profile_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "pocl" / "profiles").mkdir(parents=True)
    (tmp_path / "pocl" / "profiles" / "mine.yaml").write_text("partition: p\ncpus_per_node: 8\n")
    assert load_profile("mine").partition == "p"
    with pytest.raises(RecipeError, match="'nothing' is neither a file nor a name .*gpu, .*mine"):
        load_profile("nothing")
