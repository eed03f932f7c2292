"""Rescoring and weights of samples in `pocl estimate`."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models

from pocl_ds.cluster.estimate_page import estimate_lines
from pocl_ds.cluster.recipe_estimate import Assumptions, Estimate
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.models.estimate import GPUS, ClusterLayout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.llama(tmp_path_factory.mktemp("models") / "tiny", layers=1))


def make_estimate(model: str, curriculum: dict[str, Any], *, strategy: str = "fusion") -> Estimate:
    """1000 samples on GPUs that are so slow that a tiny model takes hours."""
    recipe = check_recipe(
        {
            "name": "x",
            "data": {"source": "train.jsonl"},
            "teacher": {"model": model},
            "student": {"model": model},
            "ranking": {"strategy": strategy},
            "curriculum": {"num_subsets": 4, "epochs_per_stage": 1, **curriculum},
            "train": {"batch_size": 8, "micro_batch_size": 2},
        }
    )
    layout, device = ClusterLayout(1, 2), GPUS["h100-80g"]
    return Estimate(recipe, Assumptions(layout, device, samples=1_000, utilization=1e-9))


def hours(lines: list[str]) -> dict[str, float]:
    """GPU hours by row of the page."""
    start = next(i for i, line in enumerate(lines) if "GPU hours" in line)
    rows = {}
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        rows[line[:26].strip()] = float(line[26:].split()[1])
    return rows


@pytest.mark.parametrize(
    ("rescoring", "rescored", "models"),
    [
        ({}, 3_000, "the student"),
        ({"share": 0.25}, 1_500, "the student"),  # all at first, then a quarter
        ({"from_stage": 4, "share": 0.25}, 1_000, "the student"),
        ({"difficulty": "kd_loss"}, 3_000, "student and teacher"),
        ({"difficulty": "loss_ratio", "share": 0.5}, 2_000, "student and teacher"),
    ],
)
def test_rescoring_has_a_line_and_is_in_the_total(
    rescoring: dict[str, Any], rescored: int, models: str, model: str
) -> None:
    lines = estimate_lines(make_estimate(model, {"rescoring": rescoring}))[0]
    (line,) = [line for line in lines if line.startswith("  rescoring")]
    stages = 4 - rescoring.get("from_stage", 2) + 1
    assert f"TFLOP of {models} over {rescored} samples before {stages} stage" in line
    rows = hours(lines)
    steps = rows["score"] + rows["train"] + rows["rescoring"]
    assert rows["rescoring"] > 1 and rows["POCL in total"] == pytest.approx(steps, abs=0.2)
    # Plain trainings score nothing.
    assert rows["plain KD, online teacher"] == rows["train"]


def test_without_rescoring_there_is_no_line(model: str) -> None:
    assert "rescoring" not in "\n".join(estimate_lines(make_estimate(model, {}))[0])


def test_a_step_that_does_not_run_is_not_estimated(model: str) -> None:
    curriculum = {"rescoring": {"from_stage": 1}}
    lines = estimate_lines(make_estimate(model, curriculum, strategy="random"))[0]
    assert not any(line.startswith(("  score", "in scoring")) for line in lines)
    lines = estimate_lines(make_estimate(model, {}))[0]
    assert sum(line.startswith(("  score", "in scoring")) for line in lines) == 2


def test_weights_by_place_shorten_the_plan(model: str) -> None:
    band = {"name": "band", "options": {"hardest": 0.6}}
    sizes = make_estimate(model, {"sample_weights": band})
    # 600 of 1000 places are at most 0.6: the stages have 150, 300, 450 and 600 samples.
    assert sizes.work.steps == (150 + 300 + 450 + 600) // 8 - 1  # 18 + 37 + 56 + 75
    page = "\n".join(estimate_lines(sizes)[0])
    assert "1000 samples (400 of them left out by curriculum.sample_weights), 186 opt" in page
    assert "may leave samples out" not in page


def test_weights_by_scores_are_not_guessed(model: str) -> None:
    unweighted = make_estimate(model, {}).work.steps
    sizes = make_estimate(model, {"sample_weights": {"name": "pass_rate"}})
    assert sizes.work.steps == unweighted
    lines = estimate_lines(sizes)[0]
    note = "curriculum.sample_weights.name=pass_rate may leave samples out"
    assert sum(line.startswith(note) for line in lines) == 1


def test_weights_of_scores_before_the_first_stage_change_no_plan(model: str) -> None:
    """The plan is made of all samples, and a stage that the student ranks keeps its steps."""
    curriculum = {
        "rescoring": {"from_stage": 1},
        "sample_weights": {"name": "loss"},
    }
    sizes = make_estimate(model, curriculum, strategy="random")
    assert sizes.work.steps == make_estimate(model, {}).work.steps
    assert "left out" not in (page := "\n".join(estimate_lines(sizes)[0]))
    assert "may leave samples out" not in page
