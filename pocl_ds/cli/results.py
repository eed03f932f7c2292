"""The commands that look at finished work and change nothing in it: compare, samples, push."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocl_ds.evaluation.side_by_side import Side
    from pocl_ds.workflow.run_dir import RunDirectory

COMMANDS = {
    "compare": (
        "say whether one model's answers are better than another's",
        "pocl compare runs/a runs/b --model student",
    ),
    "inspect": ("show samples, by subset of the ranking", "pocl inspect runs/x --subset 3 --n 5"),
    "push": (
        "upload the exported student to the Hub",
        "pocl push runs/x --repo my-org/my-student --dry-run",
    ),
}
MODELS = ("teacher", "initial", "student", "baseline")


def add_arguments(name: str, command: argparse.ArgumentParser) -> None:
    """The arguments of one of these commands."""
    if name == "compare":
        command.add_argument(
            "run",
            type=Path,
            nargs="+",
            metavar="RUN",
            help="one run directory, or two: is the second better?",
        )
        command.add_argument(
            "--model", choices=MODELS, default="student", help="of both runs (default: student)"
        )
        command.add_argument(
            "--models",
            choices=MODELS,
            nargs=2,
            metavar=("A", "B"),
            help="two models of one run, or of two",
        )
        command.add_argument(
            "--benchmark", help="only this one (default: all that both have, and their mean)"
        )
        command.add_argument("--measure", default="rouge_l", help="rouge_l, exact_match or judge")
        command.add_argument(
            "--force",
            action="store_true",
            help="also where template, decoding or items differ; it is marked",
        )
        return
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    if name == "inspect":
        command.add_argument("--split", choices=("train", "validation", "test"), default="train")
        command.add_argument(
            "--subset",
            type=int,
            metavar="K",
            help="only this subset of the ranking, 1 is the first trained on",
        )
        command.add_argument(
            "--n", type=int, default=5, help="how many, spread evenly (default: 5)"
        )
        return
    command.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository on the Hub")
    command.add_argument(
        "--private", action="store_true", help="make the repository private where it is new"
    )
    command.add_argument(
        "--folder", type=Path, help="an export that lies elsewhere (pocl export --out)"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="list what would be uploaded; do nothing"
    )


def run_command(options: argparse.Namespace) -> int:
    """Any of them."""
    from pocl_ds.runtime.tracking import setup_logging

    setup_logging()
    FUNCTIONS[options.command](options)
    return 0


def _run(path: Path) -> RunDirectory:
    from pocl_ds.errors import ArtifactError
    from pocl_ds.workflow.run_dir import RunDirectory

    if not path.is_dir():
        raise ArtifactError(f"{path} is no run directory: check the path")
    return RunDirectory(path)


def _compare(options: argparse.Namespace) -> None:
    from pocl_ds.evaluation.side_by_side import lines_of, put_side_by_side

    a, b = _sides(options)
    table = put_side_by_side(
        a, b, measure=options.measure, benchmark=options.benchmark, force=options.force
    )
    print("\n".join(lines_of(table, a, b)))


def _sides(options: argparse.Namespace) -> tuple[Side, Side]:
    """The two that are compared. One run alone needs --models; two runs take --model, or --models
    for one each.
    """
    from pocl_ds.errors import RecipeError
    from pocl_ds.evaluation.side_by_side import Side

    paths = options.run
    if len(paths) > 2:
        raise RecipeError(f"{len(paths)} run directories are named: compare two at a time")
    if len(paths) == 1 and not options.models:
        raise RecipeError(
            "one run directory is named: name a second, or two of its models, as in --models "
            "baseline student"
        )
    models = options.models or (options.model, options.model)
    runs = [_run(path) for path in paths] * (3 - len(paths))
    if runs[0].path.resolve() == runs[1].path.resolve() and models[0] == models[1]:
        raise RecipeError(
            f"{models[0]} of {paths[0]} would be compared with itself: name two models with "
            f"--models"
        )
    short = [run.path.resolve().name for run in runs]
    shown = [str(path) for path in paths] if short[0] == short[1] else short
    names = (
        list(models)
        if len(paths) == 1
        else [f"{run} {model}" for run, model in zip(shown, models, strict=True)]
    )
    one, other = (
        Side(run, model, name) for run, model, name in zip(runs, models, names, strict=True)
    )
    return one, other


def _samples(options: argparse.Namespace) -> None:
    from pocl_ds.data.inspect_samples import show_samples

    print(
        "\n\n".join(
            show_samples(
                _run(options.run), split=options.split, subset=options.subset, count=options.n
            )
        )
    )


def _push(options: argparse.Namespace) -> None:
    from pocl_ds.evaluation.push import push

    print(
        push(
            options.folder or _run(options.run).export,
            options.repo,
            private=options.private,
            dry_run=options.dry_run,
        )
    )


FUNCTIONS: dict[str, Any] = {"compare": _compare, "inspect": _samples, "push": _push}
