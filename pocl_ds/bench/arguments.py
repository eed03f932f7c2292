"""What a person types after `pocl bench NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pocl_ds.errors import RecipeError


def whole_numbers(arguments: Sequence[int | str], of: str, *, least: int = 1) -> tuple[int, ...]:
    """The arguments as numbers. Raises RecipeError naming the first that is not one, or is below
    `least`.
    """
    found = []
    for argument in arguments:
        text = str(argument).replace("_", "")
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise RecipeError(
                f"{argument!r} is not a number of {of}: give whole numbers of at least {least}, "
                f"as in 1000 10_000"
            )
        found.append(int(text))
    return tuple(found)


def one_path(arguments: Sequence[str], of: str) -> Path:
    """The only argument, an existing folder. Raises RecipeError for anything else."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise RecipeError(f"give {of}, and nothing else")
    return Path(arguments[0])
