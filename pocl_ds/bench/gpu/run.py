"""`pocl bench gpu`, and launch/gpu.sh: measure this package on one GPU, in parts.

    pocl bench gpu [--parts NAME,...] [--output DIR] [--dry-run]

A part that failed, or that another card, version or commit measured, runs again; others are taken
from DIR/results.json. `--parts` runs the named parts in any case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_ds.bench.gpu.machine import describe_machine
from pocl_ds.bench.gpu.parts import PARTS, Part, select_parts
from pocl_ds.bench.gpu.runner import load_results, run_parts, unfinished_parts
from pocl_ds.bench.gpu.tables import results_page
from pocl_ds.errors import RecipeError
from pocl_ds.workflow.files import atomic_write

PAGE = "results.md"
DEFAULT_OUTPUT = Path("runs/gpu")
USAGE = "give [--parts NAME,...] [--output DIR] [--dry-run]"


@dataclass(frozen=True)
class GpuArguments:
    """What a call asks for. parts: None runs those without a result."""

    parts: tuple[str, ...] | None
    output: Path
    dry_run: bool


def parse_arguments(arguments: Sequence[str]) -> GpuArguments:
    """The arguments of a call. Raises RecipeError."""
    words, parts, dry_run = list(arguments), None, False
    output = Path(os.environ.get("OUT") or DEFAULT_OUTPUT)
    while words:
        word = words.pop(0)
        if word == "--dry-run":
            dry_run = True
        elif word in ("--parts", "--output") and words:
            value = words.pop(0)
            if word == "--output":
                output = Path(value)
            else:
                parts = tuple(name for name in value.split(",") if name)
        else:
            raise RecipeError(f"{word!r} is no argument of `pocl bench gpu`: {USAGE}")
    return GpuArguments(parts, output, dry_run)


def run(
    arguments: Sequence[str] = (),
    out: Callable[[str], None] = print,
    *,
    parts: Sequence[Part] = PARTS,
) -> dict[str, Any]:
    """Run the parts, write results.json and results.md, print the page, and return the results.

    Without a GPU it is a dry run. Raises RecipeError for unknown arguments.
    """
    request = parse_arguments(arguments)
    selected = select_parts(request.parts, parts) if request.parts is not None else None
    machine = describe_machine(dry_run=request.dry_run)
    if machine["dry_run"] and not request.dry_run:
        out("no GPU is visible: this is a dry run on the CPU, with tiny shapes")
    if selected is None:
        selected = unfinished_parts(parts, load_results(request.output), machine)
    results = run_parts(selected, request.output, machine, out)
    page = results_page(results, parts)
    with atomic_write(request.output / PAGE) as file:
        file.write(page)
    out(f"\n{page}")
    return results
