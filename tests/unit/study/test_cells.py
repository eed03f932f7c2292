"""A study's file, and the cells that it expands to."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from tiny_runs import write_recipe

from pocl_ds.cli.main import main
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.config.registry import BENCHMARKS, STRATEGIES
from pocl_ds.errors import RecipeError
from pocl_ds.resources import STUDIES
from pocl_ds.study.cells import Cell, expand_cells, load_study, sample_visits


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    recipe = write_recipe(
        tmp_path, tmp_path / "teacher", tmp_path / "student", max_train_samples=40
    )
    return {
        "name": "small",
        "base": str(recipe),
        "arms": {"kd": ["curriculum.num_subsets=1"], "pocl": []},
        "seeds": [1, 2],
        "grid": {
            "loss.name": ["fkl", "rkl"],
            "size": {"short": ["curriculum.epochs_per_stage=1"], "long": []},
        },
        "compare": [["pocl", "kd"]],
    }


def read_cells(tree: dict[str, Any], folder: Path, *words: str) -> list[Cell]:
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return expand_cells(load_study(str(folder / "study.yaml")), words)


def test_every_combination_is_a_cell(tree: dict[str, Any], tmp_path: Path) -> None:
    cells = read_cells(tree, tmp_path, "train.lr=0.5")
    assert len(cells) == 2 * 2 * 2 * 2 == len({cell.name for cell in cells})
    cell = next(cell for cell in cells if cell.name == "pocl-rkl-short-seed2")
    recipe = cell.recipe
    assert (
        recipe.loss.name,
        recipe.curriculum.epochs_per_stage,
        recipe.curriculum.num_subsets,
        recipe.seed,
    ) == (
        "rkl",
        1,
        3,
        2,
    )
    assert (
        recipe.train.lr == 0.5 and cell.group == "pocl, rkl, short" and sample_visits(recipe) == 2.0
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": {}}, "arms: it needs at least 1 entry"),
        (
            {"compare": [["pocl", "sft"]]},
            "compare names the arm 'sft', which is not among kd, pocl",
        ),
        ({"seeds": [1, 1]}, "seeds has a value twice"),
        ({"grids": {}}, "grids does not exist: did you mean grid"),
        (
            {"arms": {"kd": ["curriculum.num_subset=1"]}, "compare": []},
            "arm 'kd' at .*did you mean num_subsets",
        ),
        (
            {"arms": {"kd": ["evaluate.models=[teacher]"]}, "compare": []},
            "'kd-.*seed1' does not evaluate the student",
        ),
        (
            {"arms": {"kd": [], "pocl": ["evaluate.temperature=0.5"]}},
            "'kd-.*' and 'pocl-.*' are evaluated in different ways",
        ),
        (
            {"arms": {"kd": [], "pocl": ["evaluate.benchmarks=[test,dolly]"]}},
            "are evaluated in different ways",
        ),
        ({"grid": {"a": {"x y": [], "x-y": []}}}, "two cells have the folder name 'kd-x-y-seed1'"),
    ],
)
def test_an_error_in_a_study_names_its_place(
    tree: dict[str, Any], change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        read_cells({**tree, **change}, tmp_path)


def test_an_unknown_study_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"'none' is neither a file nor a shipped study \(ablations, "
    ):
        load_study("none")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_study_is_complete_and_fair(path: Path) -> None:
    study = load_study(path.stem)
    assert study.name == path.stem and (study.compare or study.until == "rank")
    cells = expand_cells(study)
    visits = [sample_visits(cell.recipe) for cell in cells]
    assert max(visits) == min(visits)
    assert study.until == "rank" or all(cell.recipe.train.lr_restart == "never" for cell in cells)


def test_the_shipped_ablations_cover_every_part_of_the_method() -> None:
    cells = {
        cell.arm: cell.recipe for cell in expand_cells(load_study("ablations")) if cell.seed == 42
    }
    orders = {(recipe.ranking.strategy, recipe.ranking.reverse) for recipe in cells.values()}
    assert orders == {*((name, False) for name in STRATEGIES), ("fusion", True)}
    assert {recipe.curriculum.temperature for recipe in cells.values()} == {
        (1, 2),
        (2, 1),
        (1, 1),
        (2, 2),
    }
    assert {recipe.curriculum.sft_ratio for recipe in cells.values()} == {
        (0.3, 0),
        (0.3, 0.3),
        (0, 0),
    }
    assert {recipe.curriculum.scheduler for recipe in cells.values()} == {"baby_step", "one_pass"}
    assert {sample_visits(recipe) for recipe in cells.values()} == {20}
    subsets = load_study("subsets")
    assert {cell.recipe.curriculum.num_subsets for cell in expand_cells(subsets)} == {
        1,
        2,
        3,
        4,
        5,
        8,
        16,
    }
    assert {better for better, _ in subsets.compare} == set(subsets.arms) - {"n1"}


def test_the_shipped_paper_study_has_seven_methods_with_and_without_the_curriculum() -> None:
    study = load_study("paper")
    cells = expand_cells(study)
    methods = {(cell.recipe.policy.name, cell.recipe.loss.name) for cell in cells}
    assert methods == {
        *(("off", name) for name in ("fkl", "rkl", "jsd", "tvd", "skl", "srkl")),
        ("gkd", "jsd"),
    }
    assert len(cells) == 28 and {(cell.recipe.curriculum.num_subsets > 1) for cell in cells} == {
        True,
        False,
    }
    assert {sample_visits(cell.recipe) for cell in cells} == {20}
    pairs = {(c.recipe.teacher and c.recipe.teacher.model, c.recipe.student.model) for c in cells}
    shipped = [load_recipe(name) for name in ("gpt2-1.5b-to-0.1b", "opt-2.7b-to-350m")]
    assert pairs == {(r.teacher and r.teacher.model, r.student.model) for r in shipped}


def test_the_paper_study_follows_the_paper_in_its_evaluation() -> None:
    """Its benchmarks, evaluation seeds and sampling; and its numbers, whose means are published
    too.
    """
    study = load_study("paper")
    evaluate = expand_cells(study)[0].recipe.evaluate
    assert tuple(evaluate.benchmarks) == BENCHMARKS and evaluate.seeds == (10, 20, 30, 40, 50)
    assert (evaluate.temperature, evaluate.top_p, evaluate.max_new_tokens) == (1, 1, 256)
    assert study.published is not None
    means = {
        group: [value[0] for value in values.values()]
        for group, values in study.published.values.items()
    }
    published = {
        "kd": [18.10, 19.44, 19.44, 20.67, 19.91, 21.44, 20.17],
        "pocl": [19.70, 20.97, 21.26, 22.76, 22.51, 22.94, 22.51],
    }
    for arm, expected in published.items():
        groups = [f"{arm}, gpt2-1.5b-to-0.1b, {method}" for method in study.grid["method"]]
        assert [fmean(means.pop(group)) for group in groups] == pytest.approx(expected, abs=0.011)
    assert not means


def test_a_dry_run_lists_the_cells_and_does_nothing(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_cells(tree, tmp_path)
    arguments = [
        "study",
        str(tmp_path / "study.yaml"),
        "--run-dir",
        str(tmp_path / "runs"),
        "--dry-run",
        "train.lr=0.1",
    ]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert (
        "pocl-rkl-long-seed2" in output
        and "NOT EQUAL" not in output
        and not (tmp_path / "runs").exists()
    )
