"""One step in this process: each step has its function, and gets the part of its work that is
asked for.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pocl_ds.config import BenchmarkConfig, EvaluateConfig
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.evaluate_step import _requested_part
from pocl_ds.workflow.pipeline import run_in_process
from pocl_ds.workflow.run_dir import STEP_FOLDERS, RunDirectory
from pocl_ds.workflow.steps import STEP_NAMES, STEPS, StepRequest


def test_every_step_has_a_folder_in_the_same_order() -> None:
    assert tuple(STEP_FOLDERS) == STEP_NAMES


def test_a_step_depends_only_on_steps_before_it() -> None:
    for number, step in enumerate(STEPS):
        assert {*step.dependencies, *step.waits_for} <= set(STEP_NAMES[:number])


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("baseline", "baseline.enabled is false: set it to true to train the baseline"),
        ("cache-teacher", "teacher.mode is online: an online teacher is not cached"),
        ("generate-teacher", "policy.name is off: only seqkd and mixture train on the teacher"),
    ],
)
def test_a_step_that_the_recipe_disables(step: str, words: str, tmp_path: Path) -> None:
    recipe = check_recipe(
        {
            "name": "x",
            "data": {"source": "d.jsonl"},
            "teacher": {"model": "t"},
            "student": {"model": "s"},
        }
    )
    with pytest.raises(RecipeError, match=f"recipe field {words}"):
        run_in_process(step, recipe, RunDirectory(tmp_path))


def test_a_part_of_an_evaluation() -> None:
    config = EvaluateConfig(
        benchmarks={name: BenchmarkConfig(source=name) for name in ("test", "dolly")}, seeds=(1, 2)
    )
    assert _requested_part(config, StepRequest()) == config
    part = _requested_part(config, StepRequest(benchmark="dolly", seed=2))
    assert (list(part.benchmarks), part.seeds) == (["dolly"], (2,))
    with pytest.raises(RecipeError, match="--benchmark sni: the recipe has test, dolly"):
        _requested_part(config, StepRequest(benchmark="sni"))
    with pytest.raises(RecipeError, match="--seed 3: the recipe has 1, 2"):
        _requested_part(config, StepRequest(seed=3))
