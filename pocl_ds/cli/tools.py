"""Further tools: bench, study."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocl_ds.bench import BENCHMARKS
from pocl_ds.cli.parameters import OverridesArgument, complete_profile, complete_study
from pocl_ds.cli.tables import print_table

if TYPE_CHECKING:
    from pocl_ds.study.cells import Cell, StudyConfig

PANEL = "Tools"
REFRESH_SECONDS = 5.0


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this panel."""
    app.command(
        "bench",
        rich_help_panel=PANEL,
        epilog="Example: pocl bench rouge",
        context_settings={"ignore_unknown_options": True},  # each benchmark parses its own options
    )(bench)
    app.command(
        "study",
        rich_help_panel=PANEL,
        epilog="Example: pocl study paper --run-dir studies/paper",
    )(study)


def _complete_benchmark(incomplete: str) -> list[str]:
    return [name for name in ("list", *BENCHMARKS) if name.startswith(incomplete)]


def bench(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Run this benchmark; `list` shows all of them.",
            autocompletion=_complete_benchmark,
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ARGUMENT", help="Pass these arguments to the benchmark.", show_default=False
        ),
    ] = None,
) -> int:
    """Run a benchmark of this package on this machine."""
    import importlib

    from pocl_ds.errors import RecipeError, did_you_mean

    if name == "list":
        print_table(
            [
                ["benchmark", "measures"],
                *([benchmark, purpose] for benchmark, (_, purpose) in BENCHMARKS.items()),
            ]
        )
        return 0
    if name not in BENCHMARKS:
        raise RecipeError(f"there is no benchmark {name!r}: {did_you_mean(name, BENCHMARKS)}")
    importlib.import_module(BENCHMARKS[name][0]).run(arguments or [])
    return 0


def study(
    source: Annotated[
        str,
        typer.Argument(
            metavar="STUDY",
            help="Run this study: a file, or the name of a study in launch/studies/.",
            autocompletion=complete_study,
        ),
    ],
    overrides: OverridesArgument = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="Write the runs below this directory. Default: runs/ and the name of the study.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="List the runs and the results that they share; run nothing."
        ),
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Show the results so far; run nothing.")
    ] = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help=f"Show the results every {REFRESH_SECONDS:.0f} s until all runs finish."
        ),
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Submit to SLURM with this cluster profile; repeat the command to submit the runs "
            "that had to wait.",
            autocompletion=complete_profile,
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Train on this many nodes; needs --profile.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Estimate the hours on this GPU, for example h100-80g. Default: the GPU of the "
            "profile, or of this machine.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Run a grid of recipes that share intermediate results; print first what it costs."""
    from pocl_ds.runtime.logs import setup_logging
    from pocl_ds.study.cells import expand_cells, load_study
    from pocl_ds.study.run import is_finished, run_cells

    setup_logging()
    config = load_study(source)
    cells = expand_cells(config, tuple(overrides or ()))
    folder = run_dir or Path("runs") / config.name
    unfinished = not all(is_finished(folder, cell) for cell in cells)
    if dry_run or (unfinished and not (table or watch)):
        _print_cost(cells, gpu, profile, nodes)
    if profile and not dry_run and unfinished:
        return _submit(folder, cells, profile, nodes)
    if not (dry_run or table or watch or profile):
        run_cells(folder, cells)
    return _show_study(folder, config, cells, watch=watch)


def _print_cost(
    cells: list[Cell], gpu: str | None, profile_name: str | None, nodes: int | None
) -> None:
    """Print the runs, steps and estimated hours of a study."""
    from pocl_ds.cluster.profile import load_profile
    from pocl_ds.study.cost import GpuOptions, cost_lines

    profile = load_profile(profile_name) if profile_name else None
    print("\n".join([*cost_lines(cells, GpuOptions(gpu, profile, nodes)), ""]), flush=True)


def _show_study(folder: Path, config: StudyConfig, cells: list[Cell], *, watch: bool) -> int:
    """Print progress and results; with `watch` repeatedly until all cells are finished."""
    from pocl_ds.study.page import write_study_page
    from pocl_ds.study.run import is_finished
    from pocl_ds.study.table import progress_lines, result_lines

    # The text takes a moment to compute, so the screen is cleared when it is ready.
    clear = "\x1b[H\x1b[J" if watch and sys.stdout.isatty() else ""
    while True:
        tables = result_lines(folder, config, cells)
        lines = [*progress_lines(folder, config, cells), "", *tables]
        print(clear + "\n".join(lines).rstrip(), flush=True)
        if not watch or all(is_finished(folder, cell) for cell in cells):
            if page := write_study_page(folder, config, cells, tables):
                print(f"\nreport   {page}")
            return 0
        time.sleep(REFRESH_SECONDS)


def _submit(folder: Path, cells: list[Cell], profile_name: str, nodes: int | None) -> int:
    """Submit the cells that need no results of unfinished cells."""
    from pocl_ds.cluster import scheduler
    from pocl_ds.cluster.profile import load_profile
    from pocl_ds.cluster.submit import Submission, job_ids
    from pocl_ds.study.run import CellStates, cell_directory, record_cell

    profile, states = load_profile(profile_name), CellStates(folder, cells)

    # Copy shared results into the cells without live jobs; a live job may be writing its own.
    ids = {cell.name: job_ids(cell_directory(folder, cell)) for cell in cells}
    live = {
        job.array for job in scheduler.live_jobs([job for jobs in ids.values() for job in jobs])
    }
    idle = [cell for cell in cells if not live & set(ids[cell.name])]
    for cell in idle:
        if not states.is_finished(cell):
            record_cell(folder, cell)
            states.reuse_results(cell)

    # Submit the cells that are ready.
    submitted = [cell for cell in states.ready() if cell in idle]
    for cell in submitted:
        run = cell_directory(folder, cell)
        submission = Submission(run, cell.recipe, profile, nodes=nodes, until=cell.until)
        submission.submit()
        print(f"{cell.name}: {', '.join(job.name for job in submission.jobs)}")
    waiting = sum(not states.is_finished(cell) for cell in cells) - len(submitted)
    print(
        f"submitted {len(submitted)} of {len(cells)} cells; running or waiting for shared results: "
        f"{waiting}; repeat this command to submit them, and watch the jobs with "
        f"`pocl status --run-dir {folder} --watch`"
    )
    return 0
