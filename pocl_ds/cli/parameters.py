"""Arguments and options that several commands share, and how they become a recipe and a run
directory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from pocl_ds.resources import PROFILES, RECIPES, STUDIES, shipped_names

if TYPE_CHECKING:
    from pocl_ds.config import Recipe
    from pocl_ds.workflow.run_dir import RunDirectory


ModelName = Literal["teacher", "initial", "student", "baseline"]


def add_panel(
    app: typer.Typer, panel: str | None, commands: Iterable[tuple[str, Callable[..., int], str]]
) -> None:
    """Register commands, each with its name, function and example, in a panel of the help."""
    for name, function, example in commands:
        app.command(name, rich_help_panel=panel, epilog=f"Example: {example}")(function)


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes and paths of YAML files, for shell completion."""
    return _complete_yaml(incomplete, RECIPES)


def complete_study(incomplete: str) -> list[str]:
    """Names of shipped studies and paths of YAML files, for shell completion."""
    return _complete_yaml(incomplete, STUDIES)


def complete_profile(incomplete: str) -> list[str]:
    """Names of cluster profiles and paths of YAML files, for shell completion."""
    return _complete_yaml(incomplete, PROFILES)


def _complete_yaml(incomplete: str, shipped: Path) -> list[str]:
    names = shipped_names(shipped)
    folder, _, prefix = incomplete.rpartition("/")
    files = []
    for path in sorted(Path(folder or ".").glob(f"{prefix}*")):
        if path.is_dir() or path.suffix in (".yaml", ".yml"):
            name = f"{folder}/{path.name}" if folder else path.name
            files.append(f"{name}/" if path.is_dir() else name)
    return [name for name in [*names, *files] if name.startswith(incomplete)]


def complete_step(incomplete: str) -> list[str]:
    """Names of workflow steps, for shell completion."""
    from pocl_ds.workflow.steps import STEP_NAMES

    return [name for name in STEP_NAMES if name.startswith(incomplete)]


def complete_field(incomplete: str) -> list[str]:
    """Overrides `section.field=`, for shell completion."""
    if "=" in incomplete:
        return []
    from pocl_ds.cli.recipe_view import field_names

    return [f"{name}=" for name in field_names() if name.startswith(incomplete)]


def _complete_recipe_or_field(incomplete: str) -> list[str]:
    """The first word may also be an override, if the run directory has the recipe."""
    return complete_recipe(incomplete) or complete_field(incomplete)


RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="Use this recipe: a file, or the name of a shipped recipe (see `pocl recipes`). "
        "Default: the recipe.yaml of the run directory.",
        show_default=False,
        autocompletion=_complete_recipe_or_field,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FIELD=VALUE",
        help="Override recipe fields, as in train.lr=1e-4; overrides may appear anywhere.",
        show_default=False,
        autocompletion=complete_field,
    ),
]
RunDirOption = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        help="Read and write this run directory. Default: runs/ and the name of the recipe.",
        show_default=False,
    ),
]
ExistingRunDirOption = Annotated[
    Path, typer.Option("--run-dir", metavar="DIR", help="Read this run directory.")
]
RunDirsOption = Annotated[
    list[Path],
    typer.Option("--run-dir", metavar="DIR", help="Read this run directory; repeat the option."),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show the resolved recipe and the steps that would run; run nothing."
    ),
]


def join_words(recipe: str | None, overrides: list[str] | None) -> list[str]:
    """The positional arguments in one list: an override may precede the recipe."""
    return [*([] if recipe is None else [recipe]), *(overrides or [])]


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Separate recipes (without "=") from overrides."""
    recipes = [argument for argument in words if "=" not in argument]
    return recipes, [argument for argument in words if "=" in argument]


def read_recipe(words: list[str], run_dir: Path | None) -> tuple[Recipe, RunDirectory]:
    """The resolved recipe and the run directory of a command line.

    Raises RecipeError unless there is exactly one recipe, and as `load_recipe`.
    """
    from pocl_ds.config.recipe_file import load_recipe
    from pocl_ds.errors import RecipeError
    from pocl_ds.workflow.run_dir import RunDirectory

    recipes, overrides = split_words(words)
    if len(recipes) > 1:
        raise RecipeError(
            f"found two recipes ({recipes[0]}, {recipes[1]}): give one; overrides have the "
            f"form field=value"
        )
    if recipes:
        recipe = load_recipe(recipes[0], overrides)
    elif run_dir and (run_dir / "recipe.yaml").is_file():
        recipe = load_recipe(str(run_dir / "recipe.yaml"), overrides)
    else:
        raise RecipeError(
            "there is no recipe: name a file or a shipped recipe (pocl run quickstart), or a "
            "--run-dir that holds a recipe.yaml"
        )
    return recipe, RunDirectory(run_dir or Path("runs") / recipe.name)


def read_recipes(words: list[str], run_dir: Path | None) -> list[tuple[Recipe, RunDirectory]]:
    """Like `read_recipe`; with several recipes each gets its own folder below `run_dir`.

    Raises RecipeError if two recipes have the same name.
    """
    from pocl_ds.config.recipe_file import load_recipe
    from pocl_ds.errors import RecipeError
    from pocl_ds.workflow.run_dir import RunDirectory

    files, overrides = split_words(words)
    if len(files) < 2:
        return [read_recipe(words, run_dir)]
    recipes = [load_recipe(file, overrides) for file in files]
    names = [recipe.name for recipe in recipes]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"two recipes have the name {duplicate!r}: give each its own name")
    folder = run_dir or Path("runs")
    return [(recipe, RunDirectory(folder / recipe.name)) for recipe in recipes]


def existing_run(path: Path) -> RunDirectory:
    """A run directory that exists. Raises ArtifactError otherwise."""
    from pocl_ds.errors import ArtifactError
    from pocl_ds.workflow.run_dir import RunDirectory

    if not path.is_dir():
        raise ArtifactError(f"{path} is not a run directory: check the path")
    return RunDirectory(path)


def check_model_names(option: str, names: Iterable[str]) -> None:
    """Raise RecipeError for a name that is no model of a run. option: that has the names."""
    from pocl_ds.errors import RecipeError, did_you_mean

    known = get_args(ModelName)
    for name in names:
        if name not in known:
            raise RecipeError(
                f"{option} {name}: there is no such model: {did_you_mean(name, known)}"
            )


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N` as two integers. Raises RecipeError unless 0 <= I < N <= MAX_SHARDS."""
    from pocl_ds.config.base import MAX_SHARDS
    from pocl_ds.errors import RecipeError

    match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise RecipeError(f"--shard {text}: write I/N with I from 0 to N-1, for example 2/8")
    if int(match[2]) > MAX_SHARDS:
        raise RecipeError(f"--shard {text}: a step has at most {MAX_SHARDS} shards")
    return int(match[1]), int(match[2])
