"""`pocl report RUN...`: whether a command line names one run or several. Heavy imports happen
inside.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pocl_ds.errors import RecipeError


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `pocl report` takes beside the arguments of every stage."""
    command.add_argument(
        "--out",
        type=Path,
        help="several runs: where their page goes (default: report/ of the first)",
    )
    command.add_argument(
        "--force",
        action="store_true",
        help="several runs: also where they were evaluated in different ways",
    )


def compared(options: argparse.Namespace) -> bool:
    """Whether several runs were named, and compared. A single run's directory becomes
    `options.run_dir`.

    Raises RecipeError where options of one run and of several are mixed, and as `compare_runs`.
    """
    runs = [Path(word) for word in options.words if "=" not in word]
    if len(runs) > 1:
        if options.run_dir or options.dry_run or len(runs) < len(options.words):
            raise RecipeError(
                "several runs are compared as they are: leave out --run-dir, --dry-run and "
                "overrides"
            )
        from pocl_ds.report.compare import compare_runs

        print(f"report   {compare_runs(runs, options.out, force=options.force)}")
        return True
    if options.force or options.out:
        raise RecipeError("--force and --out are for several runs: pocl report RUN_A RUN_B")
    if runs and options.run_dir is None and (runs[0] / "recipe.yaml").is_file():
        options.run_dir, options.words = runs[0], [word for word in options.words if "=" in word]
    return False
