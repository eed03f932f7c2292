"""Time and memory of an optimizer step of distillation: this package against plain full logits,
SFT of the student, TRL, and the floor.

Every contender runs in separate processes over the same models and the same batch
(`bench.workloads`), one after the other, for `ROUNDS` rounds, so that other work on the machine
affects all of them. The floor is the step's arithmetic at the speed of this machine's matrix
products.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from pocl_ds.bench.arguments import choose_names
from pocl_ds.bench.ranks import run_ranks, run_worker
from pocl_ds.bench.workloads import (
    WORKLOADS,
    Workload,
    flops,
    gemm_rate,
    write_batches,
    write_models,
)
from pocl_ds.config.registry import TOKEN_RULES
from pocl_ds.errors import RecipeError
from pocl_ds.models.quiet import quiet

ROUNDS, STEPS = 2, 4
TRL = "TRL GKD, lmbda=0"
# Label, variant of the worker, ranks. Each contender gets all cores, divided among its ranks.
Contenders: TypeAlias = Sequence[tuple[str, str, int]]
ZERO3 = ("pocl, ZeRO-3, 1 rank", "zero3", 1)
TORCH = ("pocl, plain PyTorch", "torch", 1)
CONTENDERS: Contenders = (
    TORCH,
    ("pocl, cached teacher", "torch+cached", 1),
    ("pocl, SFT", "torch+sft", 1),
    ZERO3,
    ("pocl, ZeRO-3, 2 ranks", "zero3", 2),
    ("SFT of the student", "sft", 1),
    ("plain full logits", "full", 1),
)
# What an option of the command compares in their place, one change at a time.
OPTIONS: dict[str, Contenders] = {
    "--settings": (
        ZERO3,
        *(
            (f"pocl, ZeRO-3, {setting}", f"zero3+{setting}", 1)
            for setting in ("checkpointing", "padded", "sdpa", "eager")
        ),
    ),
    "--hooks": (
        TORCH,
        *((f"pocl, {hook}", f"torch+{hook}", 1) for hook in (*TOKEN_RULES, "sample_weights")),
    ),
}


def run(
    arguments: Sequence[str] = (),
    out: Callable[[str], None] = print,
    *,
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> dict[str, dict[str, dict[str, float]]]:
    """Print and return, by workload and contender, the median, smallest and largest seconds, and
    the peak memory in MiB.

    arguments: names of workloads (A and B by default), `--trl PYTHON` for an interpreter that has
    TRL; `--settings` for the settings of a recipe, or `--hooks` for adaptive curricula, in place of
    the other contenders. Raises RecipeError for an unknown workload.
    """
    words = [argument for argument in arguments if argument not in OPTIONS]
    names, trl = _parse(words)
    if trl and torch.cuda.is_available():
        raise RecipeError(
            "--trl measures TRL on a CPU in float32, and the other contenders would run on the "
            "GPU: leave it out on this machine"
        )
    chosen = [OPTIONS[argument] for argument in arguments if argument in OPTIONS]
    if len(chosen) > 1:
        raise RecipeError(f"{' and '.join(OPTIONS)} each replace the contenders: give one of them")
    contenders = chosen[0] if chosen else CONTENDERS
    out(f"{os.cpu_count() or 1} cores; {rounds} rounds of {steps} steps, medians")
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        rows, rates = measure_in_turn(WORKLOADS[name], contenders, trl, rounds, steps)
        _print_table(WORKLOADS[name], rows, rates, out)
        floor = flops(WORKLOADS[name]) / statistics.median(rates)
        tables[name] = {**rows, "floor": {"median": floor}}
    return tables


def _print_table(
    work: Workload,
    rows: dict[str, dict[str, float]],
    rates: list[float],
    out: Callable[[str], None],
) -> None:
    floor = flops(work) / statistics.median(rates)
    out(
        f"\n{work.name}: {work.tokens} tokens per step, "
        f"{work.loss_tokens} loss tokens; matrix products at {min(rates) / 1e9:.0f}.."
        f"{max(rates) / 1e9:.0f} GFLOP/s, floor at their median {floor:.2f} s"
    )
    out(f"{'':<24}{'seconds/step':>16}  {'(min..max)':<14}{'x floor':>8}{'peak':>12}")
    for label, row in rows.items():
        spread = f"({row['min']:.2f}..{row['max']:.2f})"
        out(
            f"{label:<24}{row['median']:>16.2f}  "
            f"{spread:<14}{row['times_floor']:>8.2f}{row['peak_mib']:>8.0f} MiB"
        )


def _parse(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Names of workloads, and the interpreter that has TRL."""
    words, trl = list(arguments), None
    if "--trl" in words:
        place = words.index("--trl")
        if place + 1 == len(words):
            raise RecipeError("--trl needs the path of a Python that has TRL installed")
        trl = words[place + 1]
        del words[place : place + 2]
    return choose_names(words, WORKLOADS, ["A", "B"]), trl


def measure_in_turn(
    work: Workload, contenders: Contenders, trl: str | None, rounds: int, steps: int
) -> tuple[dict[str, dict[str, float]], list[float]]:
    """The measurements of each contender, and the speeds of matrix products between them in FLOP/s.

    A step is compared with the floor at the speeds just before and after it, because the speed of a
    shared machine varies.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    ratios: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, list[float]] = defaultdict(list)
    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    rates = [gemm_rate(cores)]
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as name:
        folder = Path(name)
        with quiet():
            write_models(work, folder)
        # Each rank needs its own GPU.
        turns = [contender for contender in contenders if contender[2] <= gpus or not gpus]
        if trl:
            write_batches(work, folder / "steps.json", 1)
            turns.append((TRL, trl, 0))
        # Measure the contenders in turn, and the speed of the machine between them.
        for _ in range(rounds):
            for label, variant, ranks in turns:
                record = _run_contender(label, variant, ranks, work, folder, steps)
                rates.append(gemm_rate(cores))
                floor = flops(work) / statistics.fmean(rates[-2:])
                seconds[label] += record["seconds"]
                ratios[label] += [step / floor for step in record["seconds"]]
                peaks[label].append(record["peak_mib"])
    rows = {
        label: {
            "median": statistics.median(times),
            "min": min(times),
            "max": max(times),
            "times_floor": statistics.median(ratios[label]),
            "peak_mib": max(peaks[label]),
        }
        for label, times in seconds.items()
    }
    return rows, rates


def _run_contender(
    label: str, variant: str, ranks: int, work: Workload, folder: Path, steps: int
) -> dict[str, Any]:
    """One round of a contender; without ranks, variant is the interpreter that has TRL."""
    # Remove the finished run of the previous round, which would not run again.
    for finished in folder.glob("run-*"):
        shutil.rmtree(finished)
    cores, result = os.cpu_count() or 1, folder / "out.json"
    arguments = [str(folder), str(steps), str(result)]
    record: dict[str, Any]
    if ranks:
        record = run_ranks(
            label,
            "pocl_ds.bench.step_worker",
            [variant, work.name, *arguments],
            result,
            ranks=ranks,
            threads=max(1, cores // ranks),
        )
    else:
        command = [variant, str(Path(__file__).with_name("trl_worker.py")), *arguments]
        record = run_worker(label, command, result, {"OMP_NUM_THREADS": str(cores)})
    return record
