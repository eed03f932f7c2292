"""The memory of several teachers in `pocl estimate`."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models

from pocl_ds.cluster.recipe_estimate import Assumptions, Estimate
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.models.estimate import GPUS, ClusterLayout


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    layers = {"student": 1, "small": 2, "large": 4}
    return {name: str(tiny_models.llama(folder / name, layers=n)) for name, n in layers.items()}


def teacher_weights(models: dict[str, str], model: str, **others: Any) -> float:
    """Bytes of the weights of all teachers on one of two ranks."""
    recipe = check_recipe(
        {
            "name": "x",
            "data": {"source": "train.jsonl", "fields": {"domain": "category"}},
            "teacher": {"model": models[model], **others},
            "student": {"model": models["student"]},
            "curriculum": {"num_subsets": 3},
        }
    )
    estimate = Estimate(recipe, Assumptions(ClusterLayout(1, 2), GPUS["h100-80g"]))
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
