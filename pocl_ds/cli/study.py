"""`pocl study` and `pocl compare-difficulty`: their arguments and what they do."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocl_ds.study.plan import Cell

COMMANDS = {
    "study": (
        "run a grid of recipes that share what they can",
        "pocl study paper --run-dir studies/paper",
    ),
    "compare-difficulty": (
        "how far several students agree which samples are hard",
        "pocl compare-difficulty runs/small runs/large",
    ),
}
REFRESH = 5.0


def add_arguments(name: str, command: argparse.ArgumentParser) -> None:
    """The arguments of one of these commands."""
    if name == "compare-difficulty":
        command.add_argument(
            "runs",
            type=Path,
            nargs="+",
            metavar="RUN",
            help="run directories that have been ranked",
        )
        command.add_argument(
            "--subsets",
            type=int,
            help="how many to cut the order into (default: as the recipes do)",
        )
        return
    command.add_argument("study", help="a study's file, or the name of one in launch/studies/")
    command.add_argument(
        "words", nargs="*", metavar="field=value", help="dotted overrides of every cell"
    )
    command.add_argument(
        "--run-dir", type=Path, help="where the cells go (default: runs/ and the study's name)"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="list the cells and what each shares; do nothing"
    )
    command.add_argument("--table", action="store_true", help="show what there is, and end")
    command.add_argument(
        "--watch", action="store_true", help=f"the same every {REFRESH:.0f} s, until all is done"
    )
    command.add_argument(
        "--profile",
        help="submit to SLURM with this profile; the same command again submits what has waited",
    )
    command.add_argument("--nodes", type=int, help="with --profile: nodes of the trainings")


def run_command(options: argparse.Namespace) -> int:
    """Any of them."""
    return FUNCTIONS[options.command](options)


def _study(options: argparse.Namespace) -> int:
    """Run, submit or show a study."""
    from pocl_ds.runtime.tracking import setup_logging
    from pocl_ds.study.plan import cells_of, load_study
    from pocl_ds.study.run import is_finished, run_cells
    from pocl_ds.study.table import progress_lines, result_lines

    setup_logging()
    found = load_study(options.study)
    cells = cells_of(found, tuple(options.words))
    folder = options.run_dir or Path("runs") / found.name
    if (
        options.profile
        and not options.dry_run
        and not all(is_finished(folder, cell) for cell in cells)
    ):
        return _submit(options, folder, cells)
    if not (options.dry_run or options.table or options.watch or options.profile):
        run_cells(folder, cells)
    while True:
        page = "\n".join(
            [*progress_lines(folder, cells), "", *result_lines(folder, found, cells)]
        ).rstrip()
        # Cleared only now: the page takes a while to compute, and an empty terminal is no table.
        print(f"\x1b[H\x1b[J{page}" if options.watch and sys.stdout.isatty() else page, flush=True)
        if not options.watch or all(is_finished(folder, cell) for cell in cells):
            return 0
        time.sleep(REFRESH)


def _difficulty(options: argparse.Namespace) -> int:
    """Rankings of several runs side by side."""
    from pocl_ds.config.recipe_file import load_recipe
    from pocl_ds.errors import RecipeError
    from pocl_ds.study.difficulty_agreement import difficulty_lines, read_seen
    from pocl_ds.workflow.run_dir import RunDirectory

    if options.subsets is not None and options.subsets < 1:
        raise RecipeError(f"--subsets {options.subsets}: it is at least 1")
    names = [path.name for path in options.runs]
    found = [
        read_seen(RunDirectory(path), path.name if names.count(path.name) == 1 else str(path))
        for path in options.runs
    ]
    subsets = options.subsets or max(
        load_recipe(str(RunDirectory(path).recipe)).curriculum.num_subsets for path in options.runs
    )
    print("\n".join(difficulty_lines(found, subsets)))
    return 0


def _submit(options: argparse.Namespace, folder: Path, cells: list[Cell]) -> int:
    """Hand in the cells that need not wait for another's scores, teacher or baseline."""
    from pocl_ds.cluster import scheduler
    from pocl_ds.cluster.profile import load_profile
    from pocl_ds.cluster.submit import Submission, job_ids
    from pocl_ds.study.run import adopt, directory, enter, is_finished, ready

    profile = load_profile(options.profile)
    ids = {cell.name: job_ids(directory(folder, cell)) for cell in cells}
    live = {job.array for job in scheduler.live([one for found in ids.values() for one in found])}
    # The jobs of the others may be writing what would be taken over. One whose jobs were refused,
    # or ended, is handed in again.
    untouched = [cell for cell in cells if not live & set(ids[cell.name])]
    for cell in untouched:
        if not is_finished(folder, cell):
            enter(folder, cell)
            adopt(folder, cell, cells)
    now = [cell for cell in ready(folder, cells) if cell in untouched]
    for cell in now:
        submission = Submission(
            directory(folder, cell), cell.recipe, profile, nodes=options.nodes, until=cell.until
        )
        submission.submit()
        print(f"{cell.name}: {', '.join(job.name for job in submission.jobs)}")
    waiting = sum(not is_finished(folder, cell) for cell in cells) - len(now)
    print(
        f"submitted {len(now)} of {len(cells)} cells; {waiting} more run already or wait for what "
        f"these share: give the same "
        f"command again, and `pocl status {folder} --watch`"
    )
    return 0


FUNCTIONS = {"study": _study, "compare-difficulty": _difficulty}
