"""One stage in this process: each stage has its function, and gets the part of its work that is
asked for.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pocl_ds.config import BenchmarkConfig, EvaluateConfig
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import RecipeError
from pocl_ds.workflow import pipeline, steps
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import Asked


def test_every_stage_has_its_function() -> None:
    assert tuple(steps.FUNCTIONS) == pipeline.NAMES


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("baseline", "baseline.enabled is false: nothing would look at a baseline, set it to true"),
        ("cache-teacher", "teacher.mode is live: there is nothing to keep"),
        ("generate-teacher", "policy.name is off: the teacher writes for seqkd and mixture only"),
    ],
)
def test_a_stage_that_the_recipe_does_not_ask_for(stage: str, words: str, tmp_path: Path) -> None:
    recipe = check_recipe({"name": "x", "teacher": {"model": "t"}, "student": {"model": "s"}})
    with pytest.raises(RecipeError, match=f"recipe field {words}"):
        steps.run_here(stage, recipe, RunDirectory(tmp_path))


def test_a_part_of_an_evaluation() -> None:
    config = EvaluateConfig(
        benchmarks={name: BenchmarkConfig(source=name) for name in ("test", "dolly")}, seeds=(1, 2)
    )
    assert steps._part(config, Asked()) == config
    part = steps._part(config, Asked(benchmark="dolly", seed=2))
    assert (list(part.benchmarks), part.seeds) == (["dolly"], (2,))
    with pytest.raises(RecipeError, match="--benchmark sni: the recipe has test, dolly"):
        steps._part(config, Asked(benchmark="sni"))
    with pytest.raises(RecipeError, match="--seed 3: the recipe has 1, 2"):
        steps._part(config, Asked(seed=3))
