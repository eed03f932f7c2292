"""What a part of `pocl bench gpu` writes: one row a measurement, as soon as it is known.

A part is a process. The rows that it wrote before a fault or its time limit count.
"""

from __future__ import annotations

import importlib.util
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
MAX_MESSAGE = 200  # characters of an error in a table


class NotAvailable(Exception):
    """A measurement needs something that this machine does not have."""


def require_package(name: str) -> None:
    """Raise NotAvailable if a package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise NotAvailable(f"{name} is not installed")


class RowWriter:
    """Appends rows to a file, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Row) -> None:
        """Append a row, and print it to the part's log."""
        line = json.dumps(row)
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def measure(self, labels: Row, measurement: Callable[[], Row]) -> Row:
        """Append the labels with what the measurement returns, or with why it returned nothing:
        `skipped` or `error`. A fault does not end the part.
        """
        try:
            row = {**labels, **measurement()}
        except NotAvailable as reason:
            row = {**labels, "skipped": str(reason)}
        except Exception as error:  # a library may raise anything
            traceback.print_exc()
            row = {**labels, "error": describe_error(error)}
        self.write(row)
        return row


def describe_error(error: BaseException) -> str:
    """The first line of an error, with its type if the message does not say what it is."""
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    message = str(error).strip()
    first = message.splitlines()[0] if message else ""
    return f"{type(error).__name__}: {first}"[:MAX_MESSAGE]


def read_rows(path: Path) -> list[Row]:
    """The rows that a part wrote; a line that it could not finish is ignored."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows
