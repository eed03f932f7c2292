"""The run directory: folder names and the paths of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.run_dir import RunDirectory, movable_model_path, read_models


def test_a_model_in_the_run_directory_moves_with_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "one")
    models = {
        "student": movable_model_path(run, str(run.models / "heal" / "final")),
        "teacher": movable_model_path(run, "/a/teacher"),
    }
    write_json(run.models / "models.json", models)
    run.path.rename(tmp_path / "two")
    assert read_models(RunDirectory(tmp_path / "two")) == {
        "student": str(tmp_path / "two" / "models" / "heal" / "final"),
        "teacher": "/a/teacher",
    }


def test_the_folders_of_a_run_keep_their_names(tmp_path: Path) -> None:
    folders = (
        "data",
        "models",
        "teacher_cache",
        "teacher_responses",
        "scores",
        "ranking",
        "plan",
        "train",
        "baseline",
        "evaluation",
        "export",
        "report",
        "cluster",
        "logs",
    )
    run = RunDirectory(str(tmp_path))
    assert (run.path, run.recipe) == (tmp_path, tmp_path / "recipe.yaml")
    assert [getattr(run, folder) for folder in folders] == [tmp_path / folder for folder in folders]


@pytest.mark.parametrize("tree", [[], {}, {"student": 3}, {"teacher": "t"}])
def test_models_json_without_a_student_is_damaged(tmp_path: Path, tree: Any) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(ArtifactError, match=r"models\.json is missing"):
        read_models(run)
    write_json(run.models / "models.json", tree)
    with pytest.raises(
        ArtifactError, match=r"models\.json is damaged \(it names no student\): remove its folder"
    ):
        read_models(run)
    write_json(run.models / "models.json", {"student": "s", "teacher": "t"})
    assert read_models(run) == {"student": "s", "teacher": "t"}
