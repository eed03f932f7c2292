"""What checkpoints cost: the time training stands still for a save, at once and in the background,
loading, conversion, bytes.

A student of 99 million parameters (workload A of `pocl bench step`) on two ZeRO-3 ranks.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.bench.ranks import run_ranks
from pocl_ds.bench.workloads import WORKLOADS, write_models
from pocl_ds.errors import RecipeError
from pocl_ds.models.quiet import quiet

RANKS, STEPS = 2, 4


def run(arguments: Sequence[str] = (), out: Callable[[str], None] = print) -> dict[str, Any]:
    """Print and return what was measured. arguments: the name of a workload, A where none is given."""
    name = arguments[0] if arguments else "A"
    if len(arguments) > 1 or name not in WORKLOADS:
        raise RecipeError(f"give one workload, {', '.join(WORKLOADS)}, or nothing")
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as folder_name:
        folder = Path(folder_name)
        with quiet():
            write_models(WORKLOADS[name], folder)
        result = folder / "out.json"
        found: dict[str, Any] = run_ranks(
            "the ranks",
            "pocl_ds.bench.checkpoint_worker",
            [name, str(folder), str(STEPS), str(result)],
            result,
            ranks=RANKS,
            threads=max(1, (os.cpu_count() or 1) // RANKS),
        )
    out(
        f"{found['parameters'] / 1e6:.0f} million parameters, {RANKS} ZeRO-3 ranks, a step "
        f"{found['step']:.2f} s"
    )
    at_once, stall = statistics.mean(found["save"]), statistics.mean(found["stall"])
    meanwhile = found["step_meanwhile"]
    rows = (
        ("save at once", f"{at_once:.2f} s", "training stands still"),
        (
            "in the background",
            f"{stall:.2f} s",
            f"training stands still: {100 * stall / at_once:.0f}% of a save at once",
        ),
        (
            "  until it is whole",
            f"{statistics.mean(found['whole']):.2f} s",
            ""
            if meanwhile is None
            else f"steps meanwhile take {meanwhile / found['step']:.2f} times as long",
        ),
        ("load and verify", f"{found['load']:.2f} s", ""),
        ("convert", f"{found['convert']:.2f} s", "for another number of ranks"),
        ("size", f"{found['bytes_per_parameter']:.1f} bytes", "a parameter"),
    )
    for label, value, note in rows:
        out(f"{label:<22}{value:>12}   {note}")
    return found
