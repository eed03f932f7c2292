"""Texts for people: durations, numbers, and columns of a table."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any


def format_duration(seconds: float) -> str:
    """A duration in the two largest units: 3.2 s, 12 s, 3 min 20 s, 2 h 05 min; `?` if infinite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    minutes, remainder = divmod(rounded, 60)
    if minutes < 60:
        return f"{minutes} min {remainder:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def format_value(value: Any) -> str:
    """A floating-point number with four significant digits; str() of any other value."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_size(count: float) -> str:
    """A number of bytes in the largest unit of up to 999: 12 B, 3.4 MB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def code_block(text: str, language: str) -> str:
    """A block of Markdown whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def inline_code(text: object) -> str:
    """A span of code in Markdown, on one line, that no backtick in the text ends."""
    line = " ".join(str(text).split())
    fence = "`" * (_longest_run(line) + 1)
    padding = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def align_columns(
    rows: Sequence[Sequence[str]], *, numbers: bool = False, rule: bool = False
) -> list[str]:
    """The rows of a table as lines with aligned columns.

    numbers: align every column but the first to the right. rule: add a line of dashes below the
    first row.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if rule:
        rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [
        "  ".join(
            cell.rjust(width) if numbers and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
