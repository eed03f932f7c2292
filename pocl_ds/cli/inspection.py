"""Commands that inspect and compare runs and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pocl_ds.cli import pipeline
from pocl_ds.cli.parameters import (
    DryRunOption,
    ExistingRunDirOption,
    ModelName,
    OverridesArgument,
    RecipeArgument,
    RunDirOption,
    RunDirsOption,
    add_panel,
    check_model_names,
    existing_run,
    join_words,
    read_recipe,
)
from pocl_ds.cli.tables import print_table
from pocl_ds.workflow.steps import STEP

if TYPE_CHECKING:
    from pocl_ds.evaluation.compare_models import ComparedModel
    from pocl_ds.workflow.run_dir import RunDirectory

PANEL = "Inspect and compare"


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this panel."""
    commands = (
        ("report", report, STEP["report"].example),
        ("compare", compare, "pocl compare --run-dir runs/a --run-dir runs/b --model student"),
        ("inspect", inspect, "pocl inspect --run-dir runs/x --subset 3 --n 5"),
        (
            "compare-difficulty",
            compare_difficulty,
            "pocl compare-difficulty --run-dir runs/small --run-dir runs/large",
        ),
        ("verify", verify, "pocl verify --run-dir runs/x"),
        ("push", push, "pocl push --run-dir runs/x --repo my-org/my-student --dry-run"),
        ("show", show, "pocl show quickstart train.lr=1e-4"),
        ("recipes", recipes, "pocl recipes"),
    )
    add_panel(app, PANEL, commands)


def report(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    run_dir: Annotated[
        list[Path] | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="Report on this run directory; repeat the option to compare several runs.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the comparison of several runs here. Default: report/comparison.html of "
            "the first.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compare runs even if they were evaluated differently.")
    ] = False,
) -> int:
    """Write an HTML report for one run, or a comparison of several."""
    from pocl_ds.errors import RecipeError

    words, run_dirs = join_words(recipe, overrides), run_dir or []
    if len(run_dirs) < 2:
        if force or out:
            raise RecipeError(
                "--force and --out are for a comparison of several runs: repeat --run-dir"
            )
        return pipeline.run_step_command(
            "report", words, run_dirs[0] if run_dirs else None, dry_run=dry_run
        )
    if words or dry_run:
        raise RecipeError(
            "several runs are compared without changes: omit the recipe, --dry-run and overrides"
        )
    from pocl_ds.report.compare import compare_runs
    from pocl_ds.runtime.logs import setup_logging

    setup_logging()
    print(f"report   {compare_runs(run_dirs, out, force=force)}")
    return 0


def compare(
    run_dir: Annotated[
        list[Path],
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="Use this run directory; repeat the option to compare two runs.",
        ),
    ],
    model: Annotated[ModelName, typer.Option(help="Compare this model of both runs.")] = "student",
    models: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B", help="Compare model B with model A, of one run or one of each run."
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="Compare on this benchmark only. Default: all common ones and their mean."
        ),
    ] = None,
    measure: Annotated[
        str, typer.Option(help="Compare by this measure: rouge_l, exact_match, correct or judge.")
    ] = "rouge_l",
    force: Annotated[
        bool,
        typer.Option("--force", help="Compare even if template, decoding or items differ."),
    ] = False,
) -> int:
    """Test whether one model's answers are better than another's, item by item."""
    from pocl_ds.evaluation.compare_models import compare_models, comparison_lines
    from pocl_ds.runtime.logs import setup_logging

    setup_logging()
    a, b = _models_to_compare(run_dir, model, models)
    table = compare_models(a, b, measure=measure, benchmark=benchmark, force=force)
    print("\n".join(comparison_lines(table, a, b)))
    return 0


def _models_to_compare(
    paths: list[Path], model: str, pair: tuple[str, str] | None
) -> tuple[ComparedModel, ComparedModel]:
    """The two models to compare: `pair` of one run or one of each run, or `model` of two runs.

    Raises RecipeError unless this names two different models.
    """
    from pocl_ds.errors import RecipeError
    from pocl_ds.evaluation.compare_models import ComparedModel

    if len(paths) > 2:
        raise RecipeError(f"{len(paths)} run directories: compare two at a time")
    if len(paths) == 1 and not pair:
        raise RecipeError(
            "there is only one run directory: add a second --run-dir, or name two of its models, "
            "for example --models baseline student"
        )
    names = pair or (model, model)
    check_model_names("--models", names)
    runs = [existing_run(path) for path in paths] * (3 - len(paths))
    if runs[0].path.resolve() == runs[1].path.resolve() and names[0] == names[1]:
        raise RecipeError(
            f"{names[0]} of {paths[0]} would be compared with itself: name two models with --models"
        )
    # Label each model; the label includes the run if there are two.
    folders = [run.path.resolve().name for run in runs]
    run_names = [str(path) for path in paths] if folders[0] == folders[1] else folders
    labels = (
        list(names)
        if len(paths) == 1
        else [f"{run} {name}" for run, name in zip(run_names, names, strict=True)]
    )
    a, b = map(ComparedModel, runs, names, labels)
    return a, b


def inspect(
    run_dir: ExistingRunDirOption,
    split: Annotated[
        Literal["train", "validation", "test"], typer.Option(help="Show samples of this split.")
    ] = "train",
    subset: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Show this subset of the ranking only; 1 is trained on first."
        ),
    ] = None,
    n: Annotated[int, typer.Option(help="Show this many samples, spread evenly.")] = 5,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Also show the tokens, and which of them train.")
    ] = False,
) -> int:
    """Show samples as conversations or as tokens, by subset of the difficulty ranking."""
    from pocl_ds.data.inspect_samples import format_samples
    from pocl_ds.runtime.logs import setup_logging

    setup_logging()
    run = existing_run(run_dir)
    tokenizer = _student_tokenizer(run) if tokens else None
    samples = format_samples(run, split=split, subset=subset, count=n, tokenizer=tokenizer)
    print("\n\n".join(samples))
    return 0


def _student_tokenizer(run: RunDirectory) -> Any:
    """The tokenizer that made the token ids of a run. Raises ModelError if it has changed."""
    from pocl_ds.config.recipe_file import load_recipe
    from pocl_ds.data.tokenizer_digest import check_tokenizer
    from pocl_ds.models.load import load_tokenizer, pin_to_commit, resolve_model
    from pocl_ds.workflow.manifest import read_manifest

    manifest = read_manifest(run.data)
    student = load_recipe(str(run.recipe)).student
    student = pin_to_commit(student, manifest.info["commits"] if manifest else {})
    tokenizer = load_tokenizer(
        resolve_model(student),
        trust_remote_code=student.trust_remote_code,
        revision=student.revision,
    )
    check_tokenizer(run, lambda: tokenizer, "student")
    return tokenizer


def compare_difficulty(
    run_dir: RunDirsOption,
    subsets: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Divide the rankings into this many subsets. Default: as the recipes do.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Measure how far the difficulty rankings of several runs agree."""
    from pocl_ds.config.recipe_file import load_recipe
    from pocl_ds.study.difficulty_agreement import difficulty_lines, read_ranked_samples
    from pocl_ds.workflow.run_dir import RunDirectory

    names = [path.name for path in run_dir]
    labels = [path.name if names.count(path.name) == 1 else str(path) for path in run_dir]
    runs: list[RunDirectory] = [RunDirectory(path) for path in run_dir]
    rankings = [read_ranked_samples(run, label) for run, label in zip(runs, labels, strict=True)]
    count = subsets or max(load_recipe(str(run.recipe)).curriculum.num_subsets for run in runs)
    print("\n".join(difficulty_lines(rankings, count)))
    return 0


def verify(run_dir: ExistingRunDirOption) -> int:
    """Compare every file of a run with the checksum that its step wrote."""
    from pocl_ds.errors import ArtifactError
    from pocl_ds.runtime.formatting import format_size
    from pocl_ds.runtime.logs import setup_logging
    from pocl_ds.workflow.verify import verify_run

    setup_logging()
    run = existing_run(run_dir)
    results = verify_run(run)
    rows = [["result", "files", "size", "state"]]
    for result in results:
        state = "; ".join(result.faults[:3]) or "undamaged"
        rows.append([result.name, str(result.files), format_size(result.bytes), state])
    print_table(rows)
    if damaged := sum(bool(result.faults) for result in results):
        raise ArtifactError(
            f"{damaged} of {len(results)} results in {run.path} are damaged: `pocl run --run-dir "
            f"{run.path}` makes them again"
        )
    return 0


def push(
    repo: Annotated[
        str, typer.Option(metavar="ORG/NAME", help="Upload to this repository of the Hub.")
    ],
    run_dir: ExistingRunDirOption,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private if it is new.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Upload this export instead (see `pocl export --out`).",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files to upload; upload nothing.")
    ] = False,
) -> int:
    """Upload the exported student to the Hugging Face Hub."""
    from pocl_ds.evaluation.push import push as push_folder
    from pocl_ds.runtime.logs import setup_logging

    setup_logging()
    source = folder or existing_run(run_dir).export
    print(push_folder(source, repo, private=private, dry_run=dry_run))
    return 0


def show(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    run_dir: RunDirOption = None,
) -> int:
    """Show the resolved recipe as YAML and mark what differs from the defaults."""
    import sys

    from pocl_ds.cli.recipe_view import recipe_entries

    resolved, _ = read_recipe(join_words(recipe, overrides), run_dir)
    entries = recipe_entries(resolved)
    if not sys.stdout.isatty():
        print("\n".join(entry.commented for entry in entries))
        return 0
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for entry in entries:
        style = "" if entry.default is None else "bold green"
        console.print(Text(entry.commented, style=style), soft_wrap=True)
    return 0


def recipes() -> int:
    """List the shipped recipes with the hardware that they need."""
    from pocl_ds.config.yaml_io import read_yaml
    from pocl_ds.resources import RECIPES, shipped_names

    rows = [["recipe", "hardware", "description"]]
    for name in shipped_names(RECIPES):
        tree = read_yaml(RECIPES / f"{name}.yaml")
        rows.append([name, *(str(tree.get(key, "")) for key in rows[0][1:])])
    print_table(rows)
    return 0
