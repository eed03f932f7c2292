"""The cost of a study: steps that runs share, and hours of GPUs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import yaml
from tiny_runs import write_recipe

from pocl_ds.cli.main import main
from pocl_ds.cluster.estimate_page import estimate_lines
from pocl_ds.cluster.profile import check_profile
from pocl_ds.cluster.recipe_estimate import Assumptions, Estimate
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.errors import RecipeError
from pocl_ds.models.estimate import GPUS, ClusterLayout
from pocl_ds.study.cells import Cell, expand_cells, load_study
from pocl_ds.study.cost import GpuOptions, cost_lines, distinct_steps, estimate_hours


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    layers = {"student": 1, "teacher": 3}
    return {name: tiny_models.gpt2(folder / name, layers=n) for name, n in layers.items()}


@pytest.fixture
def study(models: dict[str, Path], tmp_path: Path) -> Path:
    """Two arms, two losses and two seeds, on known benchmarks and one of the user's."""
    recipe = write_recipe(tmp_path, models["teacher"], models["student"], max_train_samples=9000)
    tree: dict[str, Any] = {
        "name": "small",
        "base": str(recipe),
        "overrides": ["evaluate.benchmarks={sni: sni, vicuna: vicuna, mine: mine.jsonl}"],
        "arms": {"kd": ["curriculum.num_subsets=1"], "pocl": []},
        "grid": {"loss.name": ["fkl", "rkl"]},
        "seeds": [1, 2],
        "compare": [["pocl", "kd"]],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "study.yaml"


def read_cells(study: Path, *overrides: str) -> list[Cell]:
    return expand_cells(load_study(str(study)), overrides)


def test_steps_that_runs_share_count_once(study: Path) -> None:
    steps = distinct_steps(read_cells(study))
    counts = Counter(step.name for _, own in steps for step in own)
    # The seed enters the ranking, and the arm the plan.
    assert counts == {
        **dict.fromkeys(("preprocess", "init-student", "score"), 1),
        "rank": 2,
        "plan": 4,
        **dict.fromkeys(("train", "evaluate", "export", "report"), 8),
    }
    first = [step.name for step in steps[0][1]]
    assert "score" in first and steps[1][1][0].name == "plan"


def test_hours_are_those_of_pocl_estimate(study: Path) -> None:
    """The table of `pocl estimate` for one run, times the runs; the shared scores once."""
    device = GPUS["h100-80g"]
    cells = [cell for cell in read_cells(study) if cell.arm == "pocl"]
    hours = estimate_hours(distinct_steps(cells), device, GpuOptions(gpu=device.name))

    estimate = Estimate(cells[0].recipe, Assumptions(ClusterLayout(1, 2), device))
    setup = estimate.largest_setup(estimate.setup)
    assert setup is not None
    times = [*estimate.step_times(setup), *estimate.evaluation_times()]
    seconds = Counter({time.name: 0.0 for time in times})
    for time in times:
        seconds[time.name] += time.seconds
    gpu_hours = {name: value * 2 / 3600 for name, value in seconds.items()}
    assert hours.gpu_hours == pytest.approx(
        {
            "score": gpu_hours["score"],
            "train": 4 * gpu_hours["train"],
            "evaluate": 4 * gpu_hours["evaluate"],
        }
    )
    assert hours.hours == pytest.approx(sum(hours.gpu_hours.values()) / 2)
    assert list(hours.unknown_benchmarks) == ["mine"] and not hours.too_large


def test_evaluation_counts_models_seeds_and_items(study: Path) -> None:
    """In a row of `pocl estimate` below its totals."""

    def evaluation(*overrides: str) -> tuple[str, float]:
        recipe = read_cells(study, *overrides)[0].recipe
        estimate = Estimate(recipe, Assumptions(ClusterLayout(1, 1), GPUS["h100-80g"]))
        row = next(x for x in estimate_lines(estimate)[0] if x.startswith("  evaluate "))
        return row[46:].strip(), sum(time.seconds for time in estimate.evaluation_times())

    three, three_seconds = evaluation()
    assert three == "1774 answers by teacher, initial, student, not in the rows above; without mine"
    student, seconds = evaluation("evaluate.models=[student]", "evaluate.seeds=[1, 2]")
    assert student.startswith("3548 answers by student, ") and seconds < three_seconds
    limited, limited_seconds = evaluation("evaluate.models=[student]", "evaluate.max_samples=50")
    assert limited == "150 answers by student, not in the rows above"
    assert limited_seconds == pytest.approx(seconds * 150 / 3548)
    held_out, _ = evaluation("evaluate.benchmarks=[test]", "data.test_fraction=0.09")
    assert held_out.startswith("1000 answers by ")


@pytest.mark.parametrize(
    ("profile", "nodes", "expected"),
    [
        ({"gpu_type": "h100"}, None, "estimate on 1 x 2 h100-80g: "),
        ({"gpu_type": "nvidia_h200"}, 2, "estimate on 2 x 8 h200-141g: "),
        ({"gpu_type": "a100"}, None, "hours are not estimated: it is not known which GPU a100 is"),
        ({}, None, "hours are not estimated: profile x has no gpu_type: name one with --gpu (h200"),
    ],
)
def test_the_gpus_of_a_profile(
    profile: dict[str, Any], nodes: int | None, expected: str, study: Path
) -> None:
    tree = {"name": "x", "gpus_per_node": 8, "cpus_per_node": 8, **profile}
    options = GpuOptions(None, check_profile(tree, "x"), nodes)
    first, second, *_ = cost_lines(read_cells(study), options)
    assert first == "8 runs with 72 steps, 41 after sharing equal ones"
    assert second.startswith(expected)


def test_the_gpu_of_this_machine(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = read_cells(study)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "not estimated: this machine has no GPU: name one" in cost_lines(cells, GpuOptions())[1]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    assert cost_lines(cells, GpuOptions())[1].startswith("estimate on 1 x 2 a100-40g: ")


def test_what_limits_an_estimate_is_said(study: Path) -> None:
    options = GpuOptions(gpu="rtx4090-24g")
    cells = read_cells(study, "policy.name=gkd", "curriculum.sft_ratio=[0, 0]")
    lines = cost_lines(cells, options)
    assert lines[2].endswith(
        "not included: other steps; responses that students generate during training; answers to "
        "mine"
    )
    missing = cost_lines(read_cells(study, "student.model=/none"), options)
    assert missing[1] == (
        "hours are not estimated: model folder /none does not exist: check the path, or give a Hub "
        "name such as org/name"
    )
    with pytest.raises(RecipeError, match="--gpu h1: choose one of h200-141g"):
        cost_lines(read_cells(study), GpuOptions(gpu="h1"))


def test_runs_that_do_not_fit_are_named(study: Path) -> None:
    recipe = load_recipe(str(study.with_name("recipe.yaml")), ["prompt.max_length=500"])
    cells = [Cell("a", (), 1, recipe)]
    small = GPUS["rtx4090-24g"].__class__("tiny", 1e6, 1e12, 1e12, 1e9, 1e5)
    hours = estimate_hours(distinct_steps(cells), small, GpuOptions(gpu="rtx4090-24g"))
    assert hours.too_large == ["a-seed1"]


def test_the_command_prints_the_cost_first(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study", str(study), "--run-dir", str(tmp_path / "runs"), "--gpu", "l40s-48g"]
    assert main([*words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 runs with 72 steps, 41 after sharing equal ones"
    assert lines[1].startswith("estimate on 1 x 2 l40s-48g: ") and "GPU hours (score " in lines[1]
    assert lines[4].startswith("cell ") and not (tmp_path / "runs").exists()
    assert main([*words, "--table"]) == 0
    assert capsys.readouterr().out.startswith("cell ")
