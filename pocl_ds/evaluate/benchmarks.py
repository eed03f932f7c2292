"""Which items of a benchmark are asked: the same whichever model answers, however the file is ordered."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from pocl_ds.data.encode import EncodedSplit
from pocl_ds.errors import RecipeError

HELD_OUT = "test"


def check_names(benchmarks: Iterable[str]) -> None:
    """Names become file names. Raises RecipeError for one that cannot."""
    for name in benchmarks:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise RecipeError(f"evaluate.benchmarks name {name!r} cannot be a file name: use letters, digits, `.`, `_`, `-`")


def chosen(ids: Sequence[str], limit: int | None) -> list[int]:
    """Positions of at most `limit` ids, those whose sha256 comes first, in the order of the file.

    The choice depends on ids alone, so every model and seed answers the same questions.
    """
    if limit is None or limit >= len(ids):
        return list(range(len(ids)))
    by_hash = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    return sorted(by_hash[:limit])


def split_ids(split: EncodedSplit) -> list[str]:
    """The ids of a split as text."""
    return [bytes(value).decode() for value in split.ids]
