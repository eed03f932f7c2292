"""Cost of checkpoints: how long synchronous and asynchronous saves stop training, loading,
conversion, bytes.

The student has 99 million parameters (workload A of `pocl bench step`) on two ZeRO-3 ranks.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.bench.arguments import choose_name
from pocl_ds.bench.ranks import run_ranks
from pocl_ds.bench.workloads import WORKLOADS, write_models
from pocl_ds.models.quiet import quiet

RANKS, STEPS = 2, 4


def run(arguments: Sequence[str] = (), out: Callable[[str], None] = print) -> dict[str, Any]:
    """Print and return the measured seconds. arguments: the name of a workload, A by default."""
    name = choose_name(arguments, WORKLOADS, "A")
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as folder_name:
        folder = Path(folder_name)
        with quiet():
            write_models(WORKLOADS[name], folder)
        result = folder / "out.json"
        times: dict[str, Any] = run_ranks(
            "checkpoint",
            "pocl_ds.bench.checkpoint_worker",
            [name, str(folder), str(STEPS), str(result)],
            result,
            ranks=RANKS,
            threads=max(1, (os.cpu_count() or 1) // RANKS),
        )
    out(
        f"{times['parameters'] / 1e6:.0f} million parameters, {RANKS} ZeRO-3 ranks, optimizer step "
        f"{times['step']:.2f} s"
    )
    for label, value, note in _rows(times):
        out(f"{label:<24}{value:>12}   {note}")
    return times


def _rows(times: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and note of each line of the table."""
    save, stall = statistics.mean(times["save"]), statistics.mean(times["stall"])
    during_save = times["step_during_save"]
    slowdown = "" if during_save is None else f"{during_save / times['step']:.2f}"
    return [
        ("synchronous save", f"{save:.2f} s", "training waits"),
        (
            "asynchronous save",
            f"{stall:.2f} s",
            f"training waits: {100 * stall / save:.0f}% of a synchronous save",
        ),
        (
            "  until complete",
            f"{statistics.mean(times['complete']):.2f} s",
            slowdown and f"steps meanwhile take {slowdown} times as long",
        ),
        ("load and verify", f"{times['load']:.2f} s", ""),
        ("convert", f"{times['convert']:.2f} s", "for another number of ranks"),
        ("size", f"{times['bytes_per_parameter']:.1f} bytes", "per parameter"),
    ]
