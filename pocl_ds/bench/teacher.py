"""Cached against online teacher: an optimizer step with cached hidden states compared with SFT and
the online teacher, a complete run, and filling the cache by vLLM compared with transformers.

SmolLM2-135M into its 20-layer student (workload A of `pocl bench step`), plain PyTorch, one
process. A complete run has POCL's four stages over four batches; with a cached teacher it includes
`cache-teacher`.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.bench.arguments import choose_name
from pocl_ds.bench.ranks import run_ranks
from pocl_ds.bench.step import measure_in_turn
from pocl_ds.bench.teacher_filling import measure_filling
from pocl_ds.bench.workloads import WORKLOADS, write_models
from pocl_ds.models.quiet import quiet

ONLINE, CACHED, SFT = "online teacher", "cached teacher", "SFT"
CONTENDERS = ((ONLINE, "torch", 1), (CACHED, "torch+cached", 1), (SFT, "torch+sft", 1))
ROUNDS, STEPS, EPOCHS = 3, 4, 8
FILLING_COPIES = 8  # of the workload's samples


def run(
    arguments: Sequence[str] = (),
    out: Callable[[str], None] = print,
    *,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    epochs: int = EPOCHS,
) -> dict[str, Any]:
    """Print and return the measurements. arguments: the name of a workload, A by default. epochs:
    of each stage of a complete run. Filling is measured where vLLM is installed.
    """
    name = choose_name(arguments, WORKLOADS, "A")
    # Single steps.
    rows, _ = measure_in_turn(WORKLOADS[name], CONTENDERS, None, rounds, steps)
    out(f"{os.cpu_count() or 1} cores; workload {name}, {rounds} rounds of {steps} steps in turn")
    for label, row in rows.items():
        ratio = row["median"] / rows[SFT]["median"]
        out(
            f"  step, {label:<18}{row['median']:>8.3f} s "
            f"({row['min']:.3f}..{row['max']:.3f})   {ratio:.2f} x SFT"
        )
    # Complete runs.
    runs = _measure_runs(name, epochs)
    seconds = {label: times["cache-teacher"] + times["train"] for label, times in runs.items()}
    cached = runs[CACHED]
    out(
        f"complete run of {cached['steps']} steps: {ONLINE} {seconds[ONLINE]:.1f} s; {CACHED} "
        f"{seconds[CACHED]:.1f} s, {cached['cache-teacher']:.1f} s of it for caching: "
        f"{seconds[CACHED] / seconds[ONLINE]:.2f} of the online run"
    )
    # Reading the cache.
    read_seconds = statistics.median(cached["read"])
    out(
        f"reading a batch's hidden states from disk, cold: {1000 * read_seconds:.2f} ms "
        f"({1000 * min(cached['read']):.2f}..{1000 * max(cached['read']):.2f}), "
        f"{100 * read_seconds / cached['step']:.2f}% of a step"
    )
    filling = _measure_filling(name, rounds, out) if importlib.util.find_spec("vllm") else None
    return {
        "steps": rows,
        "runs": runs,
        "filling": filling,
        "share": seconds[CACHED] / seconds[ONLINE],
        "read_share": read_seconds / cached["step"],
    }


def _measure_filling(name: str, rounds: int, out: Callable[[str], None]) -> dict[str, Any]:
    """Tokens per second of both backends, and their ratio in each round."""
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as folder_name:
        folder = Path(folder_name)
        with quiet():
            write_models(WORKLOADS[name], folder)
        filling = measure_filling(WORKLOADS[name], folder, rounds=rounds, copies=FILLING_COPIES)
    seconds = filling["seconds"]
    for backend, values in seconds.items():
        rates = sorted(filling["tokens"] / value for value in values)
        out(
            f"filling the cache, {backend:<13}{statistics.median(rates):>7.0f} tokens/s "
            f"({rates[0]:.0f}..{rates[-1]:.0f})"
        )
    ratios = [a / b for a, b in zip(seconds["transformers"], seconds["vllm"], strict=True)]
    filling["ratio"] = statistics.median(ratios)
    out(
        f"  vLLM is {filling['ratio']:.2f} times as fast as transformers "
        f"({min(ratios):.2f}..{max(ratios):.2f})"
    )
    return filling


def _measure_runs(name: str, epochs: int) -> dict[str, dict[str, Any]]:
    """Seconds of a complete run with the online and with the cached teacher."""
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as folder_name:
        folder = Path(folder_name)
        with quiet():
            write_models(WORKLOADS[name], folder)
        for label, variant, ranks in CONTENDERS[:2]:
            result = folder / "out.json"
            runs[label] = run_ranks(
                label,
                "pocl_ds.bench.teacher_worker",
                [variant, name, folder_name, str(epochs), str(result)],
                result,
                ranks=ranks,
                threads=os.cpu_count() or 1,
            )
    return runs
