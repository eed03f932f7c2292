"""Running a study's cells: reuse what another cell has finished, run or submit the rest.

A step's fingerprint covers everything that its result depends on. If a step has one
fingerprint in two cells, both can use the same result: the scores of one student, a teacher's
cached outputs, a baseline.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from pocl_ds.config.recipe_file import dump_recipe
from pocl_ds.errors import EXIT_RESUME, ArtifactError, Interrupted, PoclError
from pocl_ds.study.cells import Cell
from pocl_ds.workflow.files import atomic_write, explain_disk_errors
from pocl_ds.workflow.finished import finished_steps
from pocl_ds.workflow.fork_server import ForkServer
from pocl_ds.workflow.locks import LockTakenError, hold_lock
from pocl_ds.workflow.pipeline import run_pipeline
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import lock_run_directory, record_recipe
from pocl_ds.workflow.steps import fingerprints

log = logging.getLogger("pocl_ds")

POLL_SECONDS = 2.0  # while other processes run all cells that are ready


def cell_directory(folder: Path, cell: Cell) -> RunDirectory:
    """A cell's run directory."""
    return RunDirectory(folder / cell.name)


class CellStates:
    """Which steps of a study's cells are finished.

    Fingerprints read the files that a recipe names, so those of a cell are computed once, and again
    after it has run.
    """

    def __init__(self, folder: Path, cells: Sequence[Cell]) -> None:
        self.folder, self.cells = folder, cells
        self._fingerprints: dict[str, dict[str, str]] = {}

    def fingerprints(self, cell: Cell) -> dict[str, str]:
        """The fingerprint that each step's result must have."""
        if cell.name not in self._fingerprints:
            self._fingerprints[cell.name] = fingerprints(cell.recipe)
        return self._fingerprints[cell.name]

    def forget(self, cell: Cell) -> None:
        """Compute a cell's fingerprints again: its inputs may have changed."""
        self._fingerprints.pop(cell.name, None)

    def finished_steps(self, cell: Cell) -> dict[str, bool]:
        """Whether each step of a cell has a complete result."""
        run, expected = cell_directory(self.folder, cell), self.fingerprints(cell)
        if not run.recipe.is_file():
            return dict.fromkeys(expected, False)
        return finished_steps(run, cell.recipe, expected=expected)

    def is_finished(self, cell: Cell) -> bool:
        """Whether all steps of a cell are finished."""
        finished = self.finished_steps(cell)
        return all(finished[step.name] for step in cell.steps)

    def ready(self) -> list[Cell]:
        """Unfinished cells that need not wait for an expensive step which they share with another
        unfinished cell.
        """
        ready: list[Cell] = []
        pending_steps: set[tuple[str, str]] = set()  # expensive steps of earlier cells
        for cell in self.cells:
            finished, digests = self.finished_steps(cell), self.fingerprints(cell)
            if all(finished[step.name] for step in cell.steps):
                continue
            expensive = {
                (step.name, digests[step.name])
                for step in cell.steps
                if step.expensive and not finished[step.name]
            }
            if not expensive & pending_steps:
                ready.append(cell)
            pending_steps |= expensive
        return ready

    def reuse_results(self, cell: Cell) -> list[str]:
        """Link the steps that other cells have finished with this cell's fingerprints into its run
        directory. Returns their names.
        """
        run, expected = cell_directory(self.folder, cell), self.fingerprints(cell)
        finished = self.finished_steps(cell)
        missing = [step for step in cell.steps if step.shareable and not finished[step.name]]
        reused: list[str] = []
        for other in self.cells:
            digests = self.fingerprints(other)
            same = [step for step in missing if digests[step.name] == expected[step.name]]
            if other is cell or not any(step.name not in reused for step in same):
                continue
            available = self.finished_steps(other)
            source = cell_directory(self.folder, other)
            for step in same:
                if step.name not in reused and available[step.name]:
                    _link_directory(step.directory(source), step.directory(run))
                    reused.append(step.name)
        return reused


def run_cells(folder: Path, cells: Sequence[Cell]) -> None:
    """Run every unfinished cell on this machine, one after the other.

    Other processes may do the same with the same folder: each takes cells that no other runs, and
    waits for expensive steps that others compute. Raises ArtifactError if a cell fails, Interrupted
    if one is stopped.
    """
    states = CellStates(folder, cells)
    with ForkServer() as server:
        while ready := states.ready():
            for cell in ready:
                if _run_unless_taken(cell, states, server):
                    break
            else:
                time.sleep(POLL_SECONDS)


def _run_unless_taken(cell: Cell, states: CellStates, server: ForkServer) -> bool:
    """Run a cell, and return False if another process runs it or has finished it."""
    run = cell_directory(states.folder, cell)
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        with hold_lock(states.folder / f".{cell.name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
            if states.is_finished(cell):
                return False
            _run_cell(cell, states, server)
            states.forget(cell)
            return True
    except LockTakenError:
        return False


def _run_cell(cell: Cell, states: CellStates, server: ForkServer) -> None:
    run = cell_directory(states.folder, cell)
    # Reuse results of other cells, then run the missing steps.
    with lock_run_directory(run):
        record_recipe(run, cell.recipe)
        reused = states.reuse_results(cell)
    note = f" (reuses {', '.join(reused)})" if reused else ""
    finished, total = sum(map(states.is_finished, states.cells)), len(states.cells)
    log.info("study: %d of %d finished, running %s%s", finished, total, cell.name, note)
    try:
        code = run_pipeline(cell.recipe, run, server, until=cell.until)
    except Interrupted as error:  # a signal ended a step that could not handle it
        raise Interrupted(f"cell {cell.name}: {error}", exit_code=error.exit_code) from None
    except PoclError as error:
        raise ArtifactError(f"cell {cell.name}: {error}") from None

    # A stopped or failing cell ends the study.
    if code in (128 + signal.SIGINT, EXIT_RESUME):
        raise Interrupted(
            f"stopped in cell {cell.name}: everything is saved; run the same command again to "
            "continue",
            exit_code=code,
        )
    if code:
        raise ArtifactError(
            f"cell {cell.name} failed with exit code {code}, see above: fix it and run the "
            "same command again"
        )


def is_finished(folder: Path, cell: Cell) -> bool:
    """Whether all steps of a cell are finished."""
    return CellStates(folder, [cell]).is_finished(cell)


def record_cell(folder: Path, cell: Cell) -> None:
    """Write a cell's recipe, so that results can be reused before its first step runs."""
    run = cell_directory(folder, cell)
    run.path.mkdir(parents=True, exist_ok=True)
    if not run.recipe.is_file():
        with atomic_write(run.recipe) as stream:
            stream.write(dump_recipe(cell.recipe))


def _link_directory(source: Path, target: Path) -> None:
    """Make `target` a copy of `source` whose files are hard links, or copies on a file system
    without links.
    """

    def link(source_file: str, target_file: str) -> None:
        try:
            os.link(source_file, target_file)
        except OSError:
            shutil.copy2(source_file, target_file)

    with explain_disk_errors(target):
        shutil.rmtree(target, ignore_errors=True)
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=link)
        os.replace(partial, target)
