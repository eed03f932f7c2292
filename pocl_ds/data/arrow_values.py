"""Values of Arrow tables, as JSON would have them."""

from __future__ import annotations

from typing import Any


def without_nulls(value: Any) -> Any:
    """A value of a nested column without what Arrow added to it.

    All structs of a column have the same keys, so a row without one holds None: the arguments of a
    call would name those of every other tool. Maps are lists of (key, value) tuples. Elements of
    lists stay, None or not.
    """
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        if value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
            return {key: without_nulls(part) for key, part in value}
        return [without_nulls(item) for item in value]
    return value
