"""What it saves to ask the teacher once: a step with its stored hidden states beside SFT and the
live teacher, and a whole run.

SmolLM2-135M into its 20-layer student (workload A of `pocl bench step`), plain PyTorch, one
process. A whole run is POCL's four stages of so many epochs over four batches, `teach` included
where it belongs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.bench.ranks import run_ranks
from pocl_ds.bench.step import take_turns
from pocl_ds.bench.workloads import WORKLOADS, write_models
from pocl_ds.errors import RecipeError
from pocl_ds.models.quiet import quiet

LIVE, STORED, SFT = "live teacher", "stored teacher", "SFT"
CONTENDERS = ((LIVE, "torch", 1), (STORED, "torch+stored", 1), (SFT, "torch+sft", 1))
ROUNDS, STEPS, EPOCHS = 3, 4, 8


def run(
    arguments: Sequence[str] = (),
    out: Callable[[str], None] = print,
    *,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    epochs: int = EPOCHS,
) -> dict[str, Any]:
    """Print and return what was measured. arguments: the name of a workload, A where none is given."""
    name = arguments[0] if arguments else "A"
    if len(arguments) > 1 or name not in WORKLOADS:
        raise RecipeError(f"give one workload, {', '.join(WORKLOADS)}, or nothing")
    work, cores = WORKLOADS[name], os.cpu_count() or 1
    rows, _ = take_turns(work, CONTENDERS, None, rounds, steps)
    out(f"{cores} cores; workload {name}, {rounds} rounds of {steps} steps in turn")
    for label, row in rows.items():
        beside = row["median"] / rows[SFT]["median"]
        out(
            f"  a step, {label:<18}{row['median']:>8.3f} s "
            f"({row['least']:.3f}..{row['most']:.3f})   {beside:.2f} x SFT"
        )
    whole: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as folder_name:
        folder = Path(folder_name)
        with quiet():
            write_models(work, folder)
        for label, variant, ranks in CONTENDERS[:2]:
            arguments = [variant, name, folder_name, str(epochs), str(folder / "out.json")]
            whole[label] = run_ranks(
                label,
                "pocl_ds.bench.teacher_worker",
                arguments,
                folder / "out.json",
                ranks=ranks,
                threads=cores,
            )
    seconds = {label: found["cache-teacher"] + found["train"] for label, found in whole.items()}
    stored = whole[STORED]
    out(
        f"a whole run, {stored['steps']} steps: {LIVE} {seconds[LIVE]:.1f} s; {STORED} "
        f"{seconds[STORED]:.1f} s, of it teaching "
        f"{stored['cache-teacher']:.1f} s: {seconds[STORED] / seconds[LIVE]:.2f} of the live run"
    )
    read = statistics.median(stored["read"])
    out(
        f"reading a batch's states from disk, cold: {1000 * read:.2f} ms "
        f"({1000 * min(stored['read']):.2f}.."
        f"{1000 * max(stored['read']):.2f}), {100 * read / stored['step']:.2f}% of a step"
    )
    return {
        "steps": rows,
        "whole": whole,
        "share": seconds[STORED] / seconds[LIVE],
        "read_share": read / stored["step"],
    }
