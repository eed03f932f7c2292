"""Several teachers in `pocl estimate`: their memory, and their part of a cache."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import tiny_models

from pocl_ds.cluster.estimate_page import estimate_lines
from pocl_ds.cluster.recipe_estimate import Assumptions, Estimate
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import RecipeError
from pocl_ds.models.estimate import GPUS, ClusterLayout, step_times


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    layers = {"student": 1, "small": 2, "large": 4}
    return {name: str(tiny_models.llama(folder / name, layers=n)) for name, n in layers.items()}


def make_estimate(models: dict[str, str], teacher: dict[str, Any], **sections: Any) -> Estimate:
    recipe = check_recipe(
        {
            "name": "x",
            "data": {"source": "train.jsonl", "fields": {"domain": "category"}},
            "teacher": teacher,
            "student": {"model": models["student"]},
            "curriculum": {"num_subsets": 3},
            **sections,
        }
    )
    layout = ClusterLayout(1, 2)
    return Estimate(recipe, Assumptions(layout, GPUS["h100-80g"], samples=3000))


def teacher_weights(models: dict[str, str], model: str, **others: Any) -> float:
    """Bytes of the weights of all teachers on one of two ranks."""
    estimate = make_estimate(models, {"model": models[model], **others})
    memory = estimate.memory(estimate.setup)
    return memory["teacher: weights"] + memory.get("other teachers: weights", 0.0)


def test_teachers_in_memory_count_once_each(models: dict[str, str]) -> None:
    small, large = (teacher_weights(models, name) for name in ("small", "large"))
    other = {"model": models["large"]}
    by_stage = {"by_stage": {2: other, 3: other}}
    by_domain = {"by_domain": {"math": other, "code": other}}
    assert teacher_weights(models, "small", **by_stage) == large > small
    assert teacher_weights(models, "small", **by_domain) == small + large
    assert teacher_weights(models, "small", ensemble=[other]) == small + large


def test_teachers_cache_the_samples_of_their_stages(models: dict[str, str]) -> None:
    large = {"model": models["large"]}
    teacher = {"model": models["small"], "mode": "cached_hidden_states", "by_stage": {2: large}}

    def shares(**sections: Any) -> list[float]:
        return [share for _, share in make_estimate(models, teacher, **sections).cached_shares]

    small, other = make_estimate(models, {**teacher, "by_stage": {3: large}}).cached_shares
    assert small[0].parameters < other[0].parameters and (small[1], other[1]) == (2 / 3, 1)
    assert shares() == [1, 2 / 3]
    one_pass = {"num_subsets": 3, "scheduler": "one_pass"}
    assert shares(curriculum=one_pass) == [2 / 3, 1 / 3]
    assert shares(curriculum=one_pass, baseline={"enabled": True}) == [1, 1 / 3]
    rescored = {**one_pass, "rescoring": {"from_stage": 2}}
    assert shares(curriculum=rescored) == [1, 1]


def test_the_page_has_the_cache_of_all_teachers(models: dict[str, str]) -> None:
    """Tiny models have states of one width, so the sizes are those of the shares."""
    large, hidden = {"model": models["large"]}, {"mode": "cached_hidden_states"}
    single = make_estimate(models, {"model": models["small"], **hidden})
    by_stage = make_estimate(models, {"model": models["small"], **hidden, "by_stage": {2: large}})
    by_domain = make_estimate(
        models, {"model": models["small"], **hidden, "by_domain": {"m": large}}
    )
    pages = [" ".join(estimate_lines(e)[0]) for e in (single, by_stage, by_domain)]
    sizes = [float(re.findall(r"hidden states (?:at most )?([\d.]+) MB", p)[0]) for p in pages]
    assert sizes[1] == pytest.approx(5 / 3 * sizes[0], rel=0.01) and sizes[2] == sizes[0] > 0
    assert "at most" in pages[2] and "at most" not in pages[0] + pages[1]
    heads = by_domain.memory(by_domain.setup)
    assert heads["other teachers: heads"] == heads["teacher: head"]
    assert "other teachers: heads" not in by_stage.memory(by_stage.setup)


def test_a_teacher_on_ranks_of_its_own_takes_no_memory_of_the_students(
    models: dict[str, str],
) -> None:
    shared = make_estimate(models, {"model": models["large"]})
    own = make_estimate(models, {"model": models["large"], "placement": "own_ranks"})
    memory, before = own.memory(own.setup), shared.memory(shared.setup)
    assert "teacher: weights" not in memory and memory["teacher: head"] > 0
    # One rank of the two is the student's, and the other has all weights of the teacher.
    assert memory["student: weights"] == 2 * before["student: weights"]
    of_teacher = own.teacher_rank_memory(own.setup)
    assert of_teacher["teacher: weights"] == 2 * before["teacher: weights"]
    assert shared.teacher_rank_memory(shared.setup) == {}
    page = "\n".join(estimate_lines(own)[0])
    assert "2 ranks, teacher online on 1 of them alone" in page
    assert re.search(r"memory of each rank that runs the teacher: +2\.\d+ GB", page)


def test_student_and_teacher_on_ranks_of_their_own_compute_at_the_same_time(
    models: dict[str, str],
) -> None:
    def seconds(ranks: int, teacher: dict[str, Any]) -> float:
        estimate = make_estimate(models, {"model": models["large"], **teacher})
        assumptions = replace(
            estimate.assumptions, layout=ClusterLayout(1, ranks), utilization=1e-9
        )
        estimate.assumptions = assumptions
        times = step_times(
            estimate.student,
            estimate.teacher,
            estimate.setup,
            estimate.work,
            assumptions.layout,
            assumptions.device,
            utilization=1e-9,
            max_new_tokens=8,
            sequences=8,
        )
        return next(time.seconds for time in times if time.name == "train")

    one = seconds(1, {})
    split = seconds(2, {"placement": "own_ranks"})
    assert one / 2 < split < one
    # More ranks of the teacher help until the student is the slower side.
    more = [seconds(1 + n, {"placement": "own_ranks", "ranks": n}) for n in (1, 2, 8, 16)]
    assert more[0] >= more[1] >= more[2] == more[3]


def test_a_student_without_a_gpu_is_refused(models: dict[str, str]) -> None:
    own = {"model": models["large"], "placement": "own_ranks", "ranks": 2}
    with pytest.raises(RecipeError, match=r"teacher\.ranks=2 leaves no GPU for the student of 2"):
        estimate_lines(make_estimate(models, own))
