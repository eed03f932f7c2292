"""Arguments of `pocl bench NAME`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from pocl_ds.errors import RecipeError


def parse_integers(
    arguments: Sequence[int | str], unit: str, *, minimum: int = 1
) -> tuple[int, ...]:
    """Parse the arguments as integers.

    Raises RecipeError for one that is not an integer of at least `minimum`.
    """
    numbers = []
    for argument in arguments:
        text = str(argument).replace("_", "")
        if not (text.isascii() and text.isdigit()) or int(text) < minimum:
            raise RecipeError(
                f"{argument!r} is not a number of {unit}: give whole numbers of at least "
                f"{minimum}, as in 1000 10_000"
            )
        numbers.append(int(text))
    return tuple(numbers)


def directory_argument(arguments: Sequence[str], description: str) -> Path:
    """The only argument, an existing directory. Raises RecipeError for anything else."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise RecipeError(f"give {description}, and nothing else")
    return Path(arguments[0])


def choose_names(
    arguments: Sequence[str], known: Collection[str], default: Sequence[str]
) -> list[str]:
    """The arguments as names of workloads, or the default. Raises RecipeError for an unknown
    name.
    """
    for argument in arguments:
        if argument not in known:
            raise RecipeError(
                f"there is no workload {argument!r}: choose one of {', '.join(known)}"
            )
    return list(arguments or default)


def choose_name(arguments: Sequence[str], known: Collection[str], default: str) -> str:
    """The only argument as the name of a workload, or the default. Raises RecipeError otherwise."""
    if len(arguments) > 1:
        raise RecipeError(f"give one workload, {', '.join(known)}, or nothing")
    return choose_names(arguments, known, [default])[0]
