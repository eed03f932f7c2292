"""Tables and paths on standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence

MAX_WIDTH = 10_000  # columns of output that is not a terminal, so that no line wraps


def print_table(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> None:
    """Print rows under the header in the first one; a file gets one line per row.

    numbers: align all columns but the first to the right.
    """
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Texts of users may look like markup, so every cell is a Text.
    terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=terminal)
    for number, title in enumerate(rows[0]):
        right = numbers and number > 0
        table.add_column(Text(title), justify="right" if right else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*(Text(cell) for cell in row))
    if terminal:
        Console(highlight=False).print(table)
        return
    lines = StringIO()
    Console(file=lines, highlight=False, width=MAX_WIDTH).print(table)
    print("\n".join(line.rstrip() for line in lines.getvalue().splitlines()))
