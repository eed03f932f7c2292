"""Running a study: results that cells share, and jobs that are submitted."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import write_recipe

from pocl_ds.cli import tools
from pocl_ds.config import Recipe
from pocl_ds.errors import ArtifactError, Interrupted, PoclError
from pocl_ds.study import run as study_run
from pocl_ds.study.cells import Cell, expand_cells, load_study
from pocl_ds.study.run import (
    CellStates,
    cell_directory,
    is_finished,
    record_cell,
    run_cells,
)
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEP_NAMES, fingerprints


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


def finish(folder: Path, cell: Cell, *names: str) -> None:
    """Write a finished result of the named steps."""
    run = cell_directory(folder, cell)
    record_cell(folder, cell)
    for name in names:
        path = run.step_directory(name)
        path.mkdir(parents=True, exist_ok=True)
        (path / "result").write_text(cell.name)
        write_manifest(path, name, fingerprints(cell.recipe)[name], info={})


def test_results_of_another_cell_are_reused(tree: dict[str, Any], tmp_path: Path) -> None:
    cells = read_cells(tree, tmp_path, "ranking.strategy=random", "student.heal_steps=0")
    first, same_arm, other_arm = cells[0], cells[2], cells[1]
    finish(tmp_path, first, "preprocess", "init-student", "rank", "plan", "train")
    assert (first.arm, same_arm.arm, other_arm.arm) == ("kd", "kd", "pocl")
    record_cell(tmp_path, same_arm)
    record_cell(tmp_path, other_arm)
    assert CellStates(tmp_path, cells).reuse_results(other_arm) == [
        "preprocess",
        "init-student",
        "rank",
    ]
    assert CellStates(tmp_path, cells).reuse_results(other_arm) == []
    reused = CellStates(tmp_path, cells).reuse_results(same_arm)
    assert reused[:3] == ["preprocess", "init-student", "rank"] and "train" not in reused
    linked, original = (
        cell_directory(tmp_path, cell).data / "result" for cell in (same_arm, first)
    )
    assert os.path.samefile(linked, original) and not is_finished(tmp_path, same_arm)


def test_a_shared_step_is_submitted_once(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = read_cells(tree, tmp_path)
    assert [cell.name for cell in CellStates(tmp_path, cells).ready()] == [cells[0].name], (
        "all need the same student and scores"
    )
    monkeypatch.setattr(
        study_run,
        "finished_steps",
        lambda *_, **__: dict.fromkeys(STEP_NAMES, True) | {"train": False},
    )
    for cell in cells:
        record_cell(tmp_path, cell)
    assert CellStates(tmp_path, cells).ready() == cells


def test_fingerprints_are_computed_again_after_a_cell_has_run(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read files, which with hundreds of cells takes seconds."""
    cells = read_cells(tree, tmp_path)
    computed: list[Recipe] = []
    monkeypatch.setattr(
        study_run, "fingerprints", lambda recipe: computed.append(recipe) or fingerprints(recipe)
    )
    states = CellStates(tmp_path, cells)
    for _ in range(2):
        states.ready()
    assert computed == [cell.recipe for cell in cells]
    states.forget(cells[3])
    states.ready()
    assert computed[len(cells) :] == [cells[3].recipe]


def test_results_are_not_reused_into_a_cell_with_live_jobs(
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its jobs may be writing what another cell has finished since."""
    cells = read_cells(tree, tmp_path, "ranking.strategy=random", "student.heal_steps=0")
    done, running, waiting = cells[:3]
    finish(tmp_path, done, "preprocess", "init-student")
    record_cell(tmp_path, running)
    (cell_directory(tmp_path, running).data).mkdir()
    (cell_directory(tmp_path, running).data / "partial").touch()
    for cell in (done, running):
        (cell_directory(tmp_path, cell).cluster / "jobs").mkdir(parents=True)
        (cell_directory(tmp_path, cell).cluster / "submission.json").touch()
    (cell_directory(tmp_path, running).cluster / "jobs" / "train.ids").write_text("41\n")
    job = argparse.Namespace(array="41")
    monkeypatch.setattr(
        "pocl_ds.cluster.scheduler.live_jobs", lambda ids: [job] if "41" in ids else []
    )
    monkeypatch.setattr("pocl_ds.cluster.profile.load_profile", lambda name: None)
    submitted: list[Path] = []

    class Submission:
        jobs = ()

        def __init__(self, run: RunDirectory, *_: Any, **__: Any) -> None:
            self.run = run

        def submit(self) -> None:
            submitted.append(self.run.path)

    monkeypatch.setattr("pocl_ds.cluster.submit.Submission", Submission)
    tools._submit(tmp_path, cells[:3], "x", None)
    assert [path.name for path in cell_directory(tmp_path, running).data.iterdir()] == ["partial"]
    assert (cell_directory(tmp_path, waiting).data / "result").is_file()
    # The first cell has no live jobs (refused or failed), so the same command submits it again.
    assert submitted == [
        cell_directory(tmp_path, done).path,
        cell_directory(tmp_path, waiting).path,
    ]
    assert (
        "submitted 2 of 3 cells; running or waiting for shared results: 1;"
        in capsys.readouterr().out
    )


def test_results_are_copied_on_a_file_system_without_links(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("not here")

    monkeypatch.setattr(study_run.os, "link", refuse)
    cells = read_cells(tree, tmp_path)
    finish(tmp_path, cells[0], "preprocess")
    record_cell(tmp_path, cells[1])
    assert CellStates(tmp_path, cells).reuse_results(cells[1]) == ["preprocess"]
    assert (
        RunDirectory(cell_directory(tmp_path, cells[1]).path).data / "result"
    ).read_text() == cells[0].name


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (130, Interrupted, "stopped in cell kd.*run the same command again"),
        (75, Interrupted, "stopped in cell kd"),
        (2, ArtifactError, "cell kd.* failed with exit code 2, see above"),
    ],
)
def test_a_failing_cell_ends_the_study(
    code: int,
    error: type[PoclError],
    words: str,
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Path] = []
    monkeypatch.setattr(
        study_run, "run_pipeline", lambda _, run, *__, **___: started.append(run.path) or code
    )
    with pytest.raises(error, match=words) as exc_info:
        run_cells(tmp_path, read_cells(tree, tmp_path))
    assert len(started) == 1 and exc_info.value.exit_code == (code if error is Interrupted else 2)
