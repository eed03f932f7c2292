"""A study's file as cells, and what cells take over from one another."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import write_recipe

from pocl_ds.cli import tools
from pocl_ds.cli.main import main
from pocl_ds.config.registry import STRATEGIES
from pocl_ds.errors import ArtifactError, Interrupted, PoclError, RecipeError
from pocl_ds.resources import STUDIES
from pocl_ds.study import run as running
from pocl_ds.study.plan import Cell, cells_of, load_study, sample_visits
from pocl_ds.study.run import adopt, directory, enter, is_finished, ready, run_cells
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEP_NAMES, STEPS, fingerprints


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


def cells(tree: dict[str, Any], folder: Path, *words: str) -> list[Cell]:
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return cells_of(load_study(str(folder / "study.yaml")), words)


def test_every_combination_is_a_run_of_its_own(tree: dict[str, Any], tmp_path: Path) -> None:
    found = cells(tree, tmp_path, "train.lr=0.5")
    assert len(found) == 2 * 2 * 2 * 2 == len({cell.name for cell in found})
    one = next(cell for cell in found if cell.name == "pocl-rkl-short-seed2")
    recipe = one.recipe
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
        recipe.train.lr == 0.5 and one.group == "pocl, rkl, short" and sample_visits(recipe) == 2.0
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": {}}, "arms: dictionary should have at least 1"),
        (
            {"compare": [["pocl", "sft"]]},
            "compare names the arm 'sft', which is not among kd, pocl",
        ),
        ({"seeds": [1, 1]}, "a seed stands there twice"),
        ({"grids": {}}, "grids does not exist: did you mean grid"),
        ({"arms": {"kd": ["plan.subset=1"]}, "compare": []}, "arm 'kd' at .*did you mean subsets"),
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
        ({"grid": {"a": {"x y": [], "x-y": []}}}, "two cells would be called 'kd-x-y-seed1'"),
    ],
)
def test_a_study_that_is_wrong_says_where(
    tree: dict[str, Any], change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        cells({**tree, **change}, tmp_path)


def test_a_study_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"'none' is neither a file nor a shipped study \(ablations, "
    ):
        load_study("none")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_study_is_whole(path: Path) -> None:
    study = load_study(path.stem)
    assert study.name == path.stem and (study.compare or study.until == "rank")
    found = cells_of(study)
    visits = [sample_visits(cell.recipe) for cell in found]
    assert max(visits) == min(visits)
    assert study.until == "rank" or all(
        cell.recipe.train.lr_restart == "whole_run" for cell in found
    )


def test_the_shipped_ablations_hold_every_part_of_the_method() -> None:
    cells = {cell.arm: cell.recipe for cell in cells_of(load_study("ablations")) if cell.seed == 42}
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
    assert {cell.recipe.curriculum.num_subsets for cell in cells_of(subsets)} == {
        1,
        2,
        3,
        4,
        5,
        8,
        16,
    }
    assert {better for better, _ in subsets.compare} == set(subsets.arms) - {"n1"}


def test_the_shipped_table_holds_seven_methods_with_and_without_the_curriculum() -> None:
    cells = cells_of(load_study("paper"))
    methods = {(cell.recipe.policy.name, cell.recipe.loss.name) for cell in cells}
    assert methods == {
        *(("off", name) for name in ("fkl", "rkl", "jsd", "tvd", "skl", "srkl")),
        ("gkd", "jsd"),
    }
    assert len(cells) == 14 and {(cell.recipe.curriculum.num_subsets > 1) for cell in cells} == {
        True,
        False,
    }
    assert {sample_visits(cell.recipe) for cell in cells} == {20}


def finish(folder: Path, cell: Cell, *stages: str) -> None:
    run = directory(folder, cell)
    enter(folder, cell)
    for stage in STEPS:
        if stage.name in stages:
            where = stage.directory(run)
            where.mkdir(parents=True, exist_ok=True)
            (where / "result").write_text(cell.name)
            write_manifest(where, stage.name, fingerprints(cell.recipe)[stage.name], info={})


def test_what_another_cell_has_finished_is_taken_over(tree: dict[str, Any], tmp_path: Path) -> None:
    found = cells(tree, tmp_path, "ranking.strategy=random", "student.heal_steps=0")
    first, other, another_plan = found[0], found[2], found[1]
    finish(tmp_path, first, "preprocess", "init-student", "rank", "plan", "train")
    assert (first.arm, other.arm, another_plan.arm) == ("kd", "kd", "pocl")
    enter(tmp_path, other)
    enter(tmp_path, another_plan)
    assert adopt(tmp_path, another_plan, found) == ["preprocess", "init-student", "rank"]
    assert adopt(tmp_path, another_plan, found) == []
    taken = adopt(tmp_path, other, found)
    assert taken[:3] == ["preprocess", "init-student", "rank"] and "train" not in taken
    mine, theirs = (directory(tmp_path, cell).data / "result" for cell in (other, first))
    assert os.path.samefile(mine, theirs) and not is_finished(tmp_path, other)


def test_what_cells_share_is_submitted_once(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cells(tree, tmp_path)
    assert [cell.name for cell in ready(tmp_path, found)] == [
        found[0].name
    ]  # all need the same student and scores
    monkeypatch.setattr(
        running.pipeline,
        "finished",
        lambda run, recipe: dict.fromkeys(STEP_NAMES, True) | {"train": False},
    )
    assert ready(tmp_path, found) == found


def test_what_a_submitted_cell_is_writing_is_left_alone(
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its jobs may be at work on what another cell has finished meanwhile."""
    found = cells(tree, tmp_path, "ranking.strategy=random", "student.heal_steps=0")
    done, at_work, waiting = found[:3]
    finish(tmp_path, done, "preprocess", "init-student")
    enter(tmp_path, at_work)
    (directory(tmp_path, at_work).data).mkdir()
    (directory(tmp_path, at_work).data / "half").touch()
    for cell in (done, at_work):
        (directory(tmp_path, cell).cluster / "jobs").mkdir(parents=True)
        (directory(tmp_path, cell).cluster / "submission.json").touch()
    (directory(tmp_path, at_work).cluster / "jobs" / "train.ids").write_text("41\n")
    queued = argparse.Namespace(array="41")
    monkeypatch.setattr(
        "pocl_ds.cluster.scheduler.live", lambda ids: [queued] if "41" in ids else []
    )
    monkeypatch.setattr("pocl_ds.cluster.profile.load_profile", lambda name: None)
    handed_in: list[Path] = []

    class Submission:
        jobs = ()

        def __init__(self, run: RunDirectory, *_: Any, **__: Any) -> None:
            self.run = run

        def submit(self) -> None:
            handed_in.append(self.run.path)

    monkeypatch.setattr("pocl_ds.cluster.submit.Submission", Submission)
    tools._submit(tmp_path, found[:3], "x", None)
    assert [path.name for path in directory(tmp_path, at_work).data.iterdir()] == ["half"]
    assert (directory(tmp_path, waiting).data / "result").is_file()
    # The first one's jobs were refused, or failed: the same command hands it in again.
    assert handed_in == [directory(tmp_path, done).path, directory(tmp_path, waiting).path]
    assert "submitted 2 of 3 cells; running or waiting for shared results: 1;" in capsys.readouterr().out


def test_links_fall_back_to_copies(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("not here")

    monkeypatch.setattr(running.os, "link", refuse)
    found = cells(tree, tmp_path)
    finish(tmp_path, found[0], "preprocess")
    enter(tmp_path, found[1])
    assert adopt(tmp_path, found[1], found) == ["preprocess"]
    assert (RunDirectory(directory(tmp_path, found[1]).path).data / "result").read_text() == found[
        0
    ].name


def test_the_command_lists_cells_and_does_nothing(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells(tree, tmp_path)
    arguments = [
        "study",
        str(tmp_path / "study.yaml"),
        "--run-dir",
        str(tmp_path / "runs"),
        "--dry-run",
        "train.lr=0.1",
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert (
        "pocl-rkl-long-seed2" in said
        and "NOT EQUAL" not in said
        and not (tmp_path / "runs").exists()
    )


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (130, Interrupted, "stopped in cell kd.*the same command goes on"),
        (75, Interrupted, "stopped in cell kd"),
        (2, ArtifactError, "cell kd.* ended with code 2, see above"),
    ],
)
def test_a_cell_that_does_not_end_well_ends_the_study(
    code: int,
    error: type[PoclError],
    words: str,
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(pipeline, "call", lambda command: started.append(command) or code)
    with pytest.raises(error, match=words) as found:
        run_cells(tmp_path, cells(tree, tmp_path))
    assert len(started) == 1 and found.value.exit_code == (code if error is Interrupted else 2)
