"""Binding a run directory to a recipe: the lock, and what is refused before anything runs."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from pathlib import Path

import pytest

from pocl_ds.config import Recipe
from pocl_ds.errors import ArtifactError, ResourceError
from pocl_ds.workflow import run_setup
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import (
    lock_run_directory,
    record_recipe,
    share_run_directory,
)


def test_a_blocking_error_inside_the_lock_passes_through(tmp_path: Path) -> None:
    """A full pipe raises BlockingIOError too, as a taken lock does."""
    with (
        pytest.raises(BlockingIOError, match="a full pipe"),
        lock_run_directory(RunDirectory(tmp_path)),
    ):
        raise BlockingIOError("a full pipe")


def test_only_a_process_that_holds_the_run_alone_removes_leftovers(tmp_path: Path) -> None:
    """Another shard may be writing such a file at that moment."""
    run = RunDirectory(tmp_path / "run")
    leftover = run.path / "scores" / ".shard-00000-of-00002.jsonl.0123456789abcdef"
    leftover.parent.mkdir(parents=True)
    run.recipe.touch()
    leftover.touch()
    with share_run_directory(run), share_run_directory(run):
        with pytest.raises(ArtifactError, match="is in use by process"), lock_run_directory(run):
            pass
        assert leftover.exists()
    with lock_run_directory(run):
        assert not leftover.exists()


def test_a_part_may_run_next_to_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example a report during the training."""
    monkeypatch.setattr(run_setup, "LOCK_WAIT_SECONDS", 0.1)
    run = RunDirectory(tmp_path)
    with lock_run_directory(run), share_run_directory(run):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_raises(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre mounted without `flock`, or NFS with a server that has no lock daemon."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    expected = pytest.raises(
        ResourceError,
        match=r"\.lock cannot be locked \(.+\): its file system is mounted without locks",
    )
    with expected, lock_run_directory(RunDirectory(tmp_path)):
        pass


def test_a_missing_tracker_raises_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tree = {
        "name": "r",
        "data": {"source": "d.jsonl"},
        "student": {"model": "m"},
        "loss": {"name": "sft"},
        "train": {"tracking": {"wandb": True}},
    }
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ResourceError, match=r"train\.tracking\.wandb=true needs the package wandb"):
        record_recipe(run, Recipe.model_validate(tree))
    assert not run.recipe.exists()
    record_recipe(run, Recipe.model_validate({**tree, "train": {}}))
    # Jobs in a container have the packages of its image.
    record_recipe(run, Recipe.model_validate(tree), runs_here=False)


def test_a_path_that_deepspeed_treats_as_a_pattern_is_refused(tmp_path: Path) -> None:
    tree = {
        "name": "r",
        "data": {"source": "d.jsonl"},
        "student": {"model": "m"},
        "loss": {"name": "sft"},
    }
    with pytest.raises(ArtifactError, match=r"contains '\[', which DeepSpeed treats as a pattern"):
        record_recipe(RunDirectory(tmp_path / "run[1]"), Recipe.model_validate(tree))
    assert not (tmp_path / "run[1]").exists()
