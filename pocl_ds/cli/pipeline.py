"""Commands of the pipeline: run, and one for each row in the table of workflow steps."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocl_ds.cli.parameters import (
    DryRunOption,
    OverridesArgument,
    RecipeArgument,
    RunDirOption,
    check_model_names,
    complete_step,
    join_words,
    parse_shard,
    read_recipe,
)
from pocl_ds.cli.tables import print_table
from pocl_ds.workflow.steps import (
    STEP,
    STEP_NAMES,
    STEPS,
    Step,
    StepRequest,
    check_step_names,
    enabled_steps,
)

if TYPE_CHECKING:
    from pocl_ds.config import Recipe
    from pocl_ds.workflow.run_dir import RunDirectory

PANEL = "Pipeline"
RUN_HELP = (
    "Run every workflow step in order and skip those that are finished.\n\n"
    "Every recipe field is documented in docs/reference/recipe.md; `pocl show RECIPE` prints the "
    "fields of a recipe with their values."
)
# Steps whose command is in another panel, since it does more than the step.
OTHER_PANELS = ("report",)

# Options of the fields of StepRequest, which a step names in `Step.options`.
REQUEST_OPTIONS: dict[str, Any] = {
    "shard": Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Process only shard I of N, counted from 0."),
    ],
    "model": Annotated[
        str | None,
        typer.Option(
            metavar="MODEL[,...]",
            help="Generate only the answers of these models (teacher, initial, student, baseline).",
        ),
    ],
    "benchmark": Annotated[
        str | None, typer.Option(help="Evaluate only this benchmark; needs --model.")
    ],
    "seed": Annotated[int | None, typer.Option(help="Use only this seed; needs --model.")],
    "out": Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write to this folder. Default: export/ in the run directory.",
            show_default=False,
        ),
    ],
    "export_to": Annotated[
        Path | None,
        typer.Option(
            "--export",
            metavar="DIR",
            help="Write the finished cache to this folder, for other runs and machines.",
            show_default=False,
        ),
    ],
    "import_from": Annotated[
        Path | None,
        typer.Option(
            "--import",
            metavar="DIR",
            help="Fill the cache from this folder, which --export or DistillKit wrote, in place of "
            "running the teacher.",
            show_default=False,
        ),
    ],
}


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this panel."""
    app.command(
        "run",
        rich_help_panel=PANEL,
        help=RUN_HELP,
        epilog="Example: pocl run quickstart --run-dir runs/first train.lr=1e-4",
    )(run)
    for step in STEPS:
        if step.name not in OTHER_PANELS:
            app.command(
                step.name,
                rich_help_panel=PANEL,
                help=step.summary,
                epilog=f"Example: {step.example}",
            )(_step_function(step))


def _step_function(step: Step) -> Callable[..., int]:
    """The function of a step's command; typer reads its options from its signature."""

    def command(
        recipe: str | None,
        overrides: list[str] | None,
        run_dir: Path | None,
        dry_run: bool,
        **options: Any,
    ) -> int:
        words = join_words(recipe, overrides)
        return run_step_command(step.name, words, run_dir, dry_run=dry_run, **options)

    # Replace the signature, since the options depend on the step.
    annotations: dict[str, Any] = {
        "recipe": RecipeArgument,
        "overrides": OverridesArgument,
        "run_dir": RunDirOption,
        "dry_run": DryRunOption,
        **{name: REQUEST_OPTIONS[name] for name in step.options},
    }
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name == "dry_run" else None,
            annotation=annotation,
        )
        for name, annotation in annotations.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def run(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    run_dir: RunDirOption = None,
    dry_run: DryRunOption = False,
    baseline: Annotated[
        bool,
        typer.Option("--baseline", help="Also train a plain KD baseline on as many sample visits."),
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(help="Start this many processes that share the models (launch.ranks)."),
    ] = None,
    until: Annotated[
        str,
        typer.Option(metavar="STEP", help="Stop after this step.", autocompletion=complete_step),
    ] = STEP_NAMES[-1],
) -> int:
    """Run every workflow step in order: `pocl run`."""
    from pocl_ds.errors import ResourceError

    rank = _set_up_rank()
    check_step_names({"--until": until})
    words = join_words(recipe, overrides)
    words += ["baseline.enabled=true"] if baseline else []
    words += [] if ranks is None else [f"launch.ranks={ranks}"]
    resolved, directory = read_recipe(words, run_dir)
    if dry_run:
        return _show_plan(resolved, directory, enabled_steps(resolved, until))
    if "RANK" in os.environ:
        raise ResourceError(
            f"RANK={rank} makes this process one of several ranks, which `pocl run` starts itself: "
            f"unset RANK and WORLD_SIZE"
        )
    from pocl_ds.workflow.fork_server import ForkServer
    from pocl_ds.workflow.pipeline import run_pipeline

    with ForkServer() as server:
        code = run_pipeline(resolved, directory, server, until=until)
    if code == 0 and until == STEP_NAMES[-1]:
        show_results(directory)
    return code


def run_step_command(
    name: str, words: list[str], run_dir: Path | None, *, dry_run: bool = False, **options: Any
) -> int:
    """Run one workflow step: `pocl NAME`.

    words: recipe and overrides. options: fields of StepRequest. The step runs in this process if it
    needs no ranks, or if this process is one of its ranks or a child of `pocl run`; otherwise it
    starts one process per rank.
    """
    from pocl_ds.runtime.logs import log_to_file
    from pocl_ds.workflow.fork_server import ForkServer
    from pocl_ds.workflow.pipeline import run_rank, run_step
    from pocl_ds.workflow.run_setup import (
        lock_run_directory,
        open_run_directory,
        share_run_directory,
    )

    # Resolve the recipe; `--shard I/N` also sets the recipe field with the number of shards.
    rank, step = _set_up_rank(), STEP[name]
    shard = parse_shard(options["shard"]) if options.get("shard") else None
    if shard and step.shards_field:
        words = [*words, f"{step.shards_field}={shard[1]}"]
    recipe, run = read_recipe(words, run_dir)
    if dry_run:
        return _show_plan(recipe, run, tuple(s for s in enabled_steps(recipe) if s.name == name))
    models = tuple(options["model"].split(",")) if options.get("model") else ()
    check_model_names("--model", models)
    request = StepRequest(**{**options, "shard": shard, "model": models})

    # This process is one rank of a step that a parent process started.
    if "RANK" in os.environ:
        log = log_to_file(run.logs / f"{name}.log") if rank == 0 else contextlib.nullcontext()
        with log:
            run_rank(name, recipe, run, request)
        return 0

    # A command that the user started; a child of `pocl run` relies on the lock of its parent.
    _check_request(step, request)
    if "POCL_WITHIN" not in os.environ:
        open_run_directory(run, recipe)
        if request.import_from:
            with lock_run_directory(run):
                return _run_here(step, recipe, run, request)
        if request.export_to:  # only reads: training may go on
            return _run_here(step, recipe, run, request)
        # An evaluation may run one process per engine, and then one for the table.
        in_children = step.needs_ranks(recipe) or (name == "evaluate" and not request.model)
        alone = in_children and shard is None  # shards run concurrently
        with lock_run_directory(run) if alone else share_run_directory(run):
            if in_children:
                with ForkServer() as server:
                    return run_step(name, run, recipe, server, shard=shard)
            return _run_here(step, recipe, run, request)
    return _run_here(step, recipe, run, request)


def _run_here(step: Step, recipe: Recipe, run: RunDirectory, request: StepRequest) -> int:
    """Run a step in this process."""
    from pocl_ds.runtime.logs import log_to_file
    from pocl_ds.workflow.pipeline import run_in_process

    with log_to_file(run.logs / f"{step.name}.log"):
        run_in_process(step.name, recipe, run, request)
    return 0


def _set_up_rank() -> int:
    """Set up logging for this rank. Returns its number, 0 for a single process."""
    from pocl_ds.runtime.logs import setup_logging
    from pocl_ds.runtime.process_exit import rank_and_world_size

    rank, ranks = rank_and_world_size()
    setup_logging(rank, world_size=ranks)
    return rank


def _check_request(step: Step, request: StepRequest) -> None:
    """Raise RecipeError if part of an evaluation is requested without its model."""
    from pocl_ds.errors import RecipeError

    if "model" not in step.options or request.model:
        return
    for name in ("shard", "benchmark", "seed"):
        if getattr(request, name) is not None:
            raise RecipeError(f"--{name} selects part of one model's answers: add --model")


def _show_plan(recipe: Recipe, run: RunDirectory, steps: tuple[Step, ...]) -> int:
    """`--dry-run`: print the recipe and the steps that would run."""
    from pocl_ds.config.recipe_file import dump_recipe
    from pocl_ds.workflow.finished import finished_steps

    print(dump_recipe(recipe), end="")
    print(f"\nrun directory: {run.path}")
    finished = finished_steps(run, recipe) if run.recipe.is_file() else {}
    width = max(len(name) for name in STEP_NAMES)
    for step in steps:
        ranks = f" on {recipe.launch.ranks} ranks" if step.needs_ranks(recipe) else ""
        if ranks and recipe.teacher_ranks:
            ranks += f", and the teacher on {recipe.teacher_ranks} of its own"
        state = "finished" if finished.get(step.name) else f"would run{ranks}"
        print(f"{step.name:<{width}}  {state}")
    return 0


def show_results(run: RunDirectory) -> None:
    """Print the table of results, what they mean, and the paths of student and report."""
    from pocl_ds.evaluation.harness_results import harness_lines
    from pocl_ds.evaluation.outcome import outcome_lines
    from pocl_ds.evaluation.tables import table_rows
    from pocl_ds.metrics.footnotes import footnotes
    from pocl_ds.workflow.files import read_json

    results = read_json(run.evaluation / "results.json")
    print()
    print_table(table_rows(results), numbers=True)
    for lines in (footnotes(results), outcome_lines(run, results), harness_lines(run, results)):
        if lines:
            print("\n".join(["", *lines]))
    print(f"\nstudent  {run.export}\nreport   {run.report / 'report.html'}")
