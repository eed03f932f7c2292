"""`pocl list`: the runs below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from pocl_ds.cluster.run_list import find_runs, list_runs
from pocl_ds.config.recipe_file import check_recipe, dump_recipe
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def make_run(path: Path, name: str) -> RunDirectory:
    run = RunDirectory(path)
    run.path.mkdir(parents=True)
    recipe = check_recipe(
        {
            "name": name,
            "data": {"source": "documentation"},
            "student": {"model": "s"},
            "loss": {"name": "sft"},
        }
    )
    run.recipe.write_text(dump_recipe(recipe))
    return run


def test_runs_are_found_at_any_depth_and_listed_newest_first(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", "first")
    second = make_run(tmp_path / "study" / "cells" / "b", "second")
    make_run(second.path / "inner", "inner")
    make_run(tmp_path / ".hidden" / "c", "hidden")
    broken = make_run(tmp_path / "broken", "broken")
    broken.recipe.write_text("name: [")
    assert list(find_runs(tmp_path)) == [first.path, broken.path, second.path]
    assert list(find_runs(first.path)) == [first.path]

    first.data.mkdir()
    write_manifest(first.data, "preprocess", "f" * 64, files=[])
    for age, run in enumerate((first, second, broken)):
        for path in (run.recipe, *run.path.glob("*/*.json")):
            os.utime(path, (1000 - age, 1000 - age))
        for path in run.path.iterdir():
            os.utime(path, (1000 - age, 1000 - age))
    listed = list_runs(tmp_path)
    assert [run.recipe for run in listed] == ["first", "second", "unreadable"]
    assert (listed[0].finished, listed[0].next_step, listed[0].state) == (
        1,
        "init-student",
        "stopped",
    )
    assert listed[1].finished == 0 and listed[1].steps == listed[0].steps > 5
    assert listed[2].state == "stopped" and not listed[2].steps


def test_a_run_whose_steps_all_have_results_is_done(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "first")
    (before,) = list_runs(tmp_path)
    for name in ("data", "models", "scores", "ranking", "plan", "train", "evaluation"):
        (run.path / name).mkdir(exist_ok=True)
        write_manifest(run.path / name, name, "f" * 64, files=[])
    (after,) = list_runs(tmp_path)
    assert before.finished < after.finished
