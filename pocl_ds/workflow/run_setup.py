"""Binding a run directory to a recipe: its lock, and the check that finished work belongs to the
recipe.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
from collections.abc import Iterator
from typing import Any

from pocl_ds.config import Recipe
from pocl_ds.config.recipe_file import dump_recipe, load_recipe
from pocl_ds.errors import ArtifactError
from pocl_ds.evaluation.verification import check_sandboxed_benchmarks
from pocl_ds.runtime.metrics import check_wandb
from pocl_ds.workflow.checks import check_ds_configs, check_harness, check_most_samples
from pocl_ds.workflow.files import (
    atomic_write,
    explain_disk_errors,
    read_json,
    remove_leftovers,
    write_json,
)
from pocl_ds.workflow.finished import finished_fingerprint, finished_steps
from pocl_ds.workflow.input_digests import changed_inputs, described_inputs
from pocl_ds.workflow.locks import LockTakenError, hold_lock
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEPS, fingerprints

log = logging.getLogger("pocl_ds")

LOCK_WAIT_SECONDS = 5.0  # how long to wait for another process that is recording its recipe


class RunDirectoryInUseError(ArtifactError):
    """Another process holds the run directory."""


@contextlib.contextmanager
def lock_run_directory(run: RunDirectory) -> Iterator[None]:
    """Hold a run directory for one pipeline at a time. What killed processes have left unfinished
    is removed first.

    No child inherits the lock: children die with the process that holds it (`parent_death`), so
    that a killed run can be continued at once. Raises RunDirectoryInUseError if another process
    holds it, ArtifactError for a folder that holds something else.
    """
    with _hold(run, fcntl.LOCK_EX):
        if count := remove_leftovers(run.path):
            log.info("removed %d unfinished files and folders of killed processes", count)
        yield


@contextlib.contextmanager
def share_run_directory(run: RunDirectory) -> Iterator[None]:
    """Hold a run directory together with other processes: for parts of a step, and for steps that
    may run next to others.

    If another process holds it alone for longer than a moment, the block runs without the lock:
    leftovers are removed only at the start of such a process.
    """
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        while time.monotonic() - start < LOCK_WAIT_SECONDS:
            try:
                stack.enter_context(_hold(run, fcntl.LOCK_SH))
                break
            except RunDirectoryInUseError:
                time.sleep(0.2)
        yield


@contextlib.contextmanager
def _hold(run: RunDirectory, operation: int) -> Iterator[None]:
    check_is_run_directory(run)
    with explain_disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(run.path / ".lock", operation | fcntl.LOCK_NB))
        except LockTakenError as error:
            raise RunDirectoryInUseError(
                f"{run.path} is in use by {error}: wait for it, or end it first"
            ) from None
        yield


def record_recipe(run: RunDirectory, recipe: Recipe, *, runs_here: bool = True) -> None:
    """Write the recipe into a run directory that the caller has locked.

    Arguments and errors are those of `check_recipe_fits`.
    """
    check_recipe_fits(run, recipe, runs_here=runs_here)
    with atomic_write(run.recipe) as stream:
        stream.write(dump_recipe(recipe))
    write_json(run.input_digests, described_inputs(recipe))


def check_recipe_fits(run: RunDirectory, recipe: Recipe, *, runs_here: bool = True) -> None:
    """Check that a recipe can run in a run directory, without writing anything.

    It may differ from the recorded one only in fields of unfinished steps and in fields that change
    no result.

    runs_here: the steps run on this machine, not in a container, so this machine must have the
    packages that the recipe needs.

    Raises ArtifactError if a finished step belongs to another recipe, RecipeError for fields that
    contradict each other, ResourceError for a missing package.
    """
    check_ds_configs(recipe)
    check_most_samples(recipe)
    if pattern := sorted(set(str(run.path.absolute())) & set("*?[")):
        raise ArtifactError(
            f"{run.path.absolute()} contains {pattern[0]!r}, which DeepSpeed treats as a pattern "
            "when it searches its checkpoints: choose another --run-dir"
        )
    if run.recipe.is_file():
        _check_finished_steps(run, recipe)
    check_is_run_directory(run)
    finished = finished_steps(run, recipe)
    if not runs_here:
        return
    if recipe.train.tracking.wandb and not finished["train"]:
        check_wandb()
    if not finished["evaluate"]:
        check_harness(recipe)
        check_sandboxed_benchmarks(recipe.evaluate)


def open_run_directory(run: RunDirectory, recipe: Recipe) -> None:
    """Record the recipe, or accept that another process has recorded the same one.

    Shards of one recipe start at the same time, and steps that wait for ranks read the recorded
    file. Raises RunDirectoryInUseError if the process that holds the directory has another recipe.
    """
    start = time.monotonic()
    while True:
        try:
            with lock_run_directory(run):
                return record_recipe(run, recipe)
        except RunDirectoryInUseError:
            text = run.recipe.read_text(encoding="utf-8") if run.recipe.is_file() else None
            if text == dump_recipe(recipe):
                return None
            if time.monotonic() - start > LOCK_WAIT_SECONDS:
                raise
        time.sleep(0.2)


def _check_finished_steps(run: RunDirectory, recipe: Recipe) -> None:
    """Raise ArtifactError if a finished step has a fingerprint that differs from the recipe's."""
    recorded = load_recipe(str(run.recipe))
    old_fingerprints, new_fingerprints = fingerprints(recorded), fingerprints(recipe)
    for step in STEPS:
        digest = finished_fingerprint(step, run)
        if step.describes_training or digest in (None, new_fingerprints[step.name]):
            continue
        fields = differing_fields(recorded.model_dump(), recipe.model_dump())
        digests = read_json(run.input_digests) if run.input_digests.is_file() else {}
        changed = [*fields, *changed_inputs(digests, recipe, same_fields=not fields)]
        # Nothing of the recipe differs: another release has other fingerprints.
        raise ArtifactError(
            f"run directory {run.path} holds the finished step {step.name!r} of another recipe "
            f"(changed: {', '.join(changed) or 'the version of pocl_ds'}): choose another "
            "--run-dir, or undo the change"
        )
    if old_fingerprints != new_fingerprints:
        log.info("the recipe changed for unfinished steps; writing %s again", run.recipe)


def check_is_run_directory(run: RunDirectory) -> None:
    """Raise ArtifactError for a folder that holds something else, before anything is written."""
    if run.recipe.is_file() or not run.path.is_dir():
        return
    if any(path.name not in ("inputs", "logs", ".lock") for path in run.path.iterdir()):
        raise ArtifactError(
            f"{run.path} is not empty and holds no recipe.yaml: choose another --run-dir"
        )


def differing_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields that differ between two trees."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            name
            for key in {**old, **new}
            for name in differing_fields(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
        ]
    return [] if old == new else [prefix]
