"""What checkpoints cost: the time training stands still for a save, at once and in the background, loading, conversion, bytes.

A student of 99 million parameters (workload A of `pocl bench step`) on two ZeRO-3 ranks.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.bench.workloads import WORKLOADS, write_models
from pocl_ds.errors import RecipeError, ResourceError
from pocl_ds.models.quiet import quiet

ROOT = Path(__file__).resolve().parents[2]
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
        found = _measure(name, folder)
    out(f"{found['parameters'] / 1e6:.0f} million parameters, {RANKS} ZeRO-3 ranks, a step {found['step']:.2f} s")
    at_once, stall = statistics.mean(found["save"]), statistics.mean(found["stall"])
    meanwhile = found["step_meanwhile"]
    rows = (
        ("save at once", f"{at_once:.2f} s", "training stands still"),
        ("in the background", f"{stall:.2f} s", f"training stands still: {100 * stall / at_once:.0f}% of a save at once"),
        ("  until it is whole", f"{statistics.mean(found['whole']):.2f} s",
         "" if meanwhile is None else f"steps meanwhile take {meanwhile / found['step']:.2f} times as long"),
        ("load and verify", f"{found['load']:.2f} s", ""),
        ("convert", f"{found['convert']:.2f} s", "for another number of ranks"),
        ("size", f"{found['bytes_per_parameter']:.1f} bytes", "a parameter"),
    )  # fmt: skip
    for label, value, note in rows:
        out(f"{label:<22}{value:>12}   {note}")
    return found


def _measure(name: str, folder: Path) -> dict[str, Any]:
    result = folder / "out.json"
    command = ["bash", str(ROOT / "launch" / "train.sh"), "--module", "pocl_ds.bench.checkpoint_worker", "--ranks", str(RANKS),
               name, str(folder), str(STEPS), str(result)]  # fmt: skip
    environment = {**os.environ, "POCL_PYTHON": sys.executable, "POCL_LOG_DIR": str(folder / "logs")}
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode or not result.is_file():
        raise ResourceError(f"the ranks ended with code {done.returncode}: {done.stderr.strip()[-600:]}")
    record: dict[str, Any] = json.loads(result.read_text())
    return record
