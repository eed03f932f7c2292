"""Running a study's cells: what another cell has finished already is taken over, the rest is run or
submitted.

A stage's fingerprint follows from everything that its result follows from. So a finished stage of
one cell is another's, where the two are equal: the scores of one student, a teacher's answers, a
baseline.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from pocl_ds.config.recipe_file import dump_recipe
from pocl_ds.errors import RESUME, ArtifactError, Interrupted
from pocl_ds.resources import module_command
from pocl_ds.study.plan import Cell
from pocl_ds.workflow.files import atomic_write, explain_disk_errors
from pocl_ds.workflow.finished import finished_steps
from pocl_ds.workflow.processes import run_process
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import lock_run_directory, record_recipe
from pocl_ds.workflow.steps import fingerprints

log = logging.getLogger("pocl_ds")

# What is taken over. Evaluation, export and report speak of the cell itself; they take seconds or
# differ anyway.
SHARED = (
    "preprocess",
    "init-student",
    "cache-teacher",
    "generate-teacher",
    "score",
    "rank",
    "plan",
    "baseline",
)
EXPENSIVE = (
    "init-student",
    "cache-teacher",
    "generate-teacher",
    "score",
    "baseline",
)  # what it is worth to wait for


def directory(folder: Path, cell: Cell) -> RunDirectory:
    """A cell's run directory."""
    return RunDirectory(folder / cell.name)


def adopt(folder: Path, cell: Cell, cells: Sequence[Cell]) -> list[str]:
    """Take over what other cells have finished of this one's stages, as hard links; returns the
    stages.
    """
    run, wanted = directory(folder, cell), fingerprints(cell.recipe)
    done = finished_steps(run, cell.recipe)
    left = [stage for stage in cell.stages if stage.name in SHARED and not done[stage.name]]
    taken: list[str] = []
    for other in cells:
        source = directory(folder, other)
        if other is cell or len(taken) == len(left) or not source.recipe.is_file():
            continue
        prints, theirs = (
            fingerprints(other.recipe),
            finished_steps(source, other.recipe),
        )
        for stage in left:
            if (
                stage.name not in taken
                and theirs[stage.name]
                and prints[stage.name] == wanted[stage.name]
            ):
                _link(stage.directory(source), stage.directory(run))
                taken.append(stage.name)
    return taken


def run_cells(folder: Path, cells: Sequence[Cell]) -> None:
    """Run every unfinished cell on this machine, one after the other. Raises ArtifactError for one
    that fails, Interrupted.
    """
    for number, cell in enumerate(cells, 1):
        run = directory(folder, cell)
        if is_finished(folder, cell):
            log.info("study %d/%d: %s is done already", number, len(cells), cell.name)
            continue
        with lock_run_directory(run):
            record_recipe(run, cell.recipe)
            taken = adopt(folder, cell, cells)
        log.info(
            "study %d/%d: %s%s",
            number,
            len(cells),
            cell.name,
            f" (shares {', '.join(taken)})" if taken else "",
        )
        code = run_process(
            [
                *module_command("pocl_ds.cli.main"),
                "run",
                "--run-dir",
                str(run.path),
                "--until",
                cell.until,
            ]
        )
        if code in (128 + signal.SIGINT, RESUME):
            raise Interrupted(
                f"stopped in cell {cell.name}: everything is saved, the same command goes on",
                exit_code=code,
            )
        if code:
            raise ArtifactError(
                f"cell {cell.name} ended with code {code}, see above: mend it, the same command "
                f"goes on"
            )


def ready(folder: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Unfinished cells that need not wait for another to do what they have in common: what can be
    submitted now.
    """
    found: list[Cell] = []
    under_way: set[tuple[str, str]] = set()
    for cell in cells:
        if is_finished(folder, cell):
            continue
        done, prints = (
            finished_steps(directory(folder, cell), cell.recipe),
            fingerprints(cell.recipe),
        )
        left = {
            (stage.name, prints[stage.name])
            for stage in cell.stages
            if stage.name in EXPENSIVE and not done[stage.name]
        }
        if not left & under_way:
            found.append(cell)
        under_way |= left
    return found


def is_finished(folder: Path, cell: Cell) -> bool:
    """Whether a cell has all its results."""
    run = directory(folder, cell)
    if not run.recipe.is_file():
        return False
    done = finished_steps(run, cell.recipe)
    return all(done[stage.name] for stage in cell.stages)


def enter(folder: Path, cell: Cell) -> None:
    """Write a cell's recipe, so that what it shares can be taken over before anything of it runs."""
    run = directory(folder, cell)
    run.path.mkdir(parents=True, exist_ok=True)
    if not run.recipe.is_file():
        with atomic_write(run.recipe) as stream:
            stream.write(dump_recipe(cell.recipe))


def _link(source: Path, target: Path) -> None:
    """A folder's files under another name, without their contents twice; where links cannot be,
    copies.
    """

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    with explain_disk_errors(target):
        shutil.rmtree(target, ignore_errors=True)
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=link)
        os.replace(partial, target)
