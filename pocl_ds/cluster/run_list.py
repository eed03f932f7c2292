"""`pocl list`: the runs below a folder, from their files and one request to the scheduler."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pocl_ds.cluster import scheduler
from pocl_ds.cluster.submit import job_ids
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.errors import PoclError
from pocl_ds.workflow.finished import finished_fingerprint
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEPS


@dataclass(frozen=True)
class ListedRun:
    """A run below the folder.

    finished, steps: number of its steps with a result, and of all that its recipe has. next_step:
    the first without one; empty if there is none. jobs: ids of jobs that wait or run. changed: of
    its newest file, in seconds since 1970.
    """

    path: str
    recipe: str
    finished: int
    steps: int
    next_step: str
    jobs: tuple[str, ...]
    changed: float

    @property
    def state(self) -> str:
        """ "done", "live" while a job waits or runs, or "stopped"."""
        if not self.next_step:
            return "done"
        return "live" if self.jobs else "stopped"


def list_runs(folder: Path) -> list[ListedRun]:
    """The runs below a folder, the newest first. A run whose recipe cannot be read has no steps."""
    runs = [RunDirectory(path) for path in find_runs(folder)]
    ids = {run.path: job_ids(run) for run in runs}
    every_id = [job_id for own in ids.values() for job_id in own]
    live = {job.array for job in scheduler.live_jobs(every_id)} if scheduler.available() else set()
    listed = [
        _listed_run(run, tuple(job_id for job_id in ids[run.path] if job_id in live))
        for run in runs
    ]
    return sorted(listed, key=lambda run: -run.changed)


def find_runs(folder: Path) -> Iterator[Path]:
    """The run directories at and below a folder; none is searched for others."""
    for path, names, files in os.walk(folder):
        if RunDirectory(Path(path)).recipe.name in files:
            names.clear()
            yield Path(path)
        names[:] = sorted(name for name in names if not name.startswith("."))


def _listed_run(run: RunDirectory, jobs: tuple[str, ...]) -> ListedRun:
    changed = max(
        (path.stat().st_mtime for path in (*run.path.iterdir(), *run.path.glob("*/*.json*"))),
        default=time.time(),
    )
    try:
        recipe = load_recipe(str(run.recipe))
    except PoclError:
        return ListedRun(str(run.path), "unreadable", 0, 0, "unknown", jobs, changed)
    steps = [step for step in STEPS if step.enabled(recipe)]
    missing = [step.name for step in steps if finished_fingerprint(step, run) is None]
    return ListedRun(
        str(run.path),
        recipe.name,
        len(steps) - len(missing),
        len(steps),
        missing[0] if missing else "",
        jobs,
        changed,
    )
