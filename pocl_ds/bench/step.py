"""Seconds and memory of one distillation step: ours against plain full logits, SFT of the student,
TRL, and the floor.

Every contender runs in processes of its own over the same models and the same batch
(`bench.workloads`), one after the other, `ROUNDS` times round: what else the machine does falls on
all. The floor is the step's arithmetic at the rate of this machine's matrix products.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pocl_ds.bench.ranks import run_ranks, run_worker
from pocl_ds.bench.workloads import WORKLOADS, Workload, flops, gemm_rate, write_models, write_steps
from pocl_ds.errors import RecipeError
from pocl_ds.models.quiet import quiet

ROUNDS, STEPS = 2, 4
TRL = "TRL GKD, lmbda=0"
# Label, variant of the worker, ranks. Each gets all cores: as threads of one rank, or shared by
# ranks.
ZERO3 = ("ours, ZeRO-3, 1 rank", "zero3", 1)
CONTENDERS = (
    ("ours, plain PyTorch", "torch", 1),
    ("ours, stored teacher", "torch+stored", 1),
    ("ours, SFT", "torch+sft", 1),
    ZERO3,
    ("ours, ZeRO-3, 2 ranks", "zero3", 2),
    ("SFT of the student", "sft", 1),
    ("plain full logits", "full", 1),
)
# What a recipe can switch, one at a time, beside "ours, ZeRO-3, 1 rank".
SWITCHES = tuple(
    (f"ours, ZeRO-3, {switch}", f"zero3+{switch}", 1)
    for switch in ("checkpointing", "padded", "sdpa", "eager")
)


def run(
    arguments: Sequence[str] = (),
    out: Callable[[str], None] = print,
    *,
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> dict[str, dict[str, dict[str, float]]]:
    """Print and return, by workload and contender, the median, least and most seconds, and the peak
    memory in MiB.

    arguments: names of workloads (A and B where none is given), `--trl PYTHON` for an interpreter
    that has TRL, `--switches` for the recipe's switches in place of the other contenders. Raises
    RecipeError for an unknown workload.
    """
    words = [word for word in arguments if word != "--switches"]
    names, trl = _parse(words)
    if trl and torch.cuda.is_available():
        raise RecipeError(
            "--trl measures TRL on a CPU in float32, and the others would run on the GPU: leave "
            "it out here"
        )
    contenders = CONTENDERS if len(words) == len(arguments) else (ZERO3, *SWITCHES)
    cores = os.cpu_count() or 1
    out(f"{cores} cores; {rounds} rounds of {steps} steps, medians")
    found = {}
    for name in names:
        work = WORKLOADS[name]
        found[name], rates = take_turns(work, contenders, trl, rounds, steps)
        floor = flops(work) / statistics.median(rates)
        out(
            f"\n{name}: {sum(n for _, n in work.lengths)} tokens a step, {work.loss_tokens} loss "
            f"tokens; matrix products at "
            f"{min(rates) / 1e9:.0f}..{max(rates) / 1e9:.0f} GFLOP/s, at their median the floor "
            f"is {floor:.2f} s"
        )
        out(f"{'':<24}{'seconds a step':>16}  {'(least..most)':<14}{'x floor':>8}{'peak':>12}")
        found[name]["floor"] = {"median": floor}
        for label, row in found[name].items():
            if label != "floor":
                spread = f"({row['least']:.2f}..{row['most']:.2f})"
                out(
                    f"{label:<24}{row['median']:>16.2f}  "
                    f"{spread:<14}{row['times_floor']:>8.2f}{row['peak_mib']:>8.0f} MiB"
                )
    return found


def _parse(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    words, trl = list(arguments), None
    if "--trl" in words:
        place = words.index("--trl")
        if place + 1 == len(words):
            raise RecipeError("--trl needs the path of a Python that has TRL installed")
        trl = words[place + 1]
        del words[place : place + 2]
    for word in words:
        if word not in WORKLOADS:
            raise RecipeError(f"there is no workload {word!r}: take {', '.join(WORKLOADS)}")
    return words or ["A", "B"], trl


Contenders = Sequence[tuple[str, str, int]]


def take_turns(
    work: Workload, contenders: Contenders, trl: str | None, rounds: int, steps: int
) -> tuple[dict[str, dict[str, float]], list[float]]:
    """What each contender took, and the rates of matrix products that were seen between them.

    A step is compared with the floor at the rates just before and after it: a shared machine's
    speed wanders.
    """
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {}
    cores = os.cpu_count() or 1
    rates = [gemm_rate(cores)]
    gpus = torch.cuda.device_count()  # where there are some, each rank needs its own
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as name:
        folder = Path(name)
        with quiet():
            write_models(work, folder)
        result, tail = (
            folder / "out.json",
            [work.name, str(folder), str(steps), str(folder / "out.json")],
        )
        turns = [one for one in contenders if one[2] <= gpus or not gpus]
        if trl:
            write_steps(work, folder / "steps.json", 1)
            turns.append((TRL, trl, 0))
        for _ in range(rounds):
            for label, variant, ranks in turns:
                for earlier in folder.glob(
                    "run-*"
                ):  # of the round before: it is finished, and would not be run again
                    shutil.rmtree(earlier)
                if ranks:
                    record = run_ranks(
                        label,
                        "pocl_ds.bench.step_worker",
                        [variant, *tail],
                        result,
                        ranks=ranks,
                        threads=max(1, cores // ranks),
                    )
                else:
                    worker = [variant, str(Path(__file__).with_name("trl_worker.py")), *tail[1:]]
                    record = run_worker(label, worker, result, {"OMP_NUM_THREADS": str(cores)})
                rates.append(gemm_rate(cores))
                floor = flops(work) / statistics.fmean(rates[-2:])
                seconds.setdefault(label, []).extend(record["seconds"])
                ratios.setdefault(label, []).extend(taken / floor for taken in record["seconds"])
                peaks.setdefault(label, []).append(record["peak_mib"])
    found = {
        label: {
            "median": statistics.median(times),
            "least": min(times),
            "most": max(times),
            "times_floor": statistics.median(ratios[label]),
            "peak_mib": max(peaks[label]),
        }
        for label, times in seconds.items()
    }
    return found, rates
