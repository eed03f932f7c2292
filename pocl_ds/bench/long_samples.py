"""One sample of 4,096 to 65,536 tokens: peak memory of a rank, predicted and measured, and time of
an optimizer step, on one rank and on two ranks that share it.

Both with activation checkpointing, on this machine's CPU. The memory of a rank without any model is
measured; all else is predicted from the configurations, as in `pocl estimate`.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pocl_ds.bench.arguments import choose_names
from pocl_ds.bench.ranks import run_ranks
from pocl_ds.bench.workloads import WORKLOADS, Workload, write_models
from pocl_ds.models.cost import activation_bytes, model_shape
from pocl_ds.models.memory import TrainingSetup, training_memory
from pocl_ds.models.quiet import quiet

NAMES = ("4k", "16k", "64k")
VARIANTS = {1: "zero3+checkpointing", 2: "zero3+sequence_parallel"}  # by the number of ranks
STEPS = 2
# Activations grow linearly with the number of tokens.
MEASURED_LENGTHS = (1024, 2048)


def run(
    arguments: Sequence[str] = (), out: Callable[[str], None] = print, *, steps: int = STEPS
) -> list[dict[str, Any]]:
    """Print and return a row for each length and number of ranks. arguments: names of workloads,
    4k, 16k and 64k by default.
    """
    names = choose_names(arguments, WORKLOADS, NAMES)
    rows = []
    out(f"{'tokens, ranks':<16}{'predicted':>12}{'measured':>12}   measured/predicted   step")
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as folder_name:
        for name in names:
            work, folder = WORKLOADS[name], Path(folder_name) / name
            with quiet():
                write_models(work, folder)
            for ranks, variant in VARIANTS.items():
                base = max(_run("idle", work, folder, ranks, steps)["peaks_mib"])
                record = _run(variant, work, folder, ranks, steps)
                predicted = sum(predict(work, ranks, base * 2**20).values()) / 2**20
                measured, seconds = max(record["peaks_mib"]), statistics.median(record["seconds"])
                out(
                    f"{f'{work.tokens:,}, {ranks}':<16}{predicted:>8.0f} MiB{measured:>8.0f} MiB"
                    f"{measured / predicted:>21.3f}{seconds:>9.2f} s"
                )
                row = {"name": name, "ranks": ranks, "base": base, "seconds": seconds}
                rows.append({**row, "predicted": predicted, "measured": measured})
    return rows


def _run(variant: str, work: Workload, folder: Path, ranks: int, steps: int) -> dict[str, Any]:
    result = folder / "out.json"
    record: dict[str, Any] = run_ranks(
        f"{variant} with {work.name}",
        "pocl_ds.bench.step_worker",
        [variant, work.name, str(folder), str(steps), str(result)],
        result,
        ranks=ranks,
        threads=max(1, (os.cpu_count() or 1) // ranks),
    )
    return record


def predict(work: Workload, ranks: int, base: float) -> dict[str, float]:
    """Peak bytes of one rank, by what occupies them. base: bytes without a model."""
    teacher, student = work.configs

    def activations(lengths: Sequence[int], checkpointing: bool) -> float:
        short, long = (
            activation_bytes(
                student,
                [length],
                dtype=torch.float32,
                attention="per_sample",
                checkpointing=checkpointing,
            )
            for length in MEASURED_LENGTHS
        )
        per_token = (long - short) / (MEASURED_LENGTHS[1] - MEASURED_LENGTHS[0])
        return short + per_token * (sum(lengths) - MEASURED_LENGTHS[0])

    setup = TrainingSetup(
        1,
        checkpointing=True,
        dtype="float32",
        teacher_dtype="float32",
        sequence_parallel_size=ranks,
    )
    return training_memory(
        model_shape(student),
        model_shape(teacher),
        setup,
        ranks,
        [work.tokens],
        work.loss_tokens,
        activations,
        base,
        gloo=True,
    )
