"""How long ranks wait for each other: micro-batches of equal tokens against those of equal
arithmetic, on responses with a long tail.

The load imbalance is that of `curriculum.load_imbalance`, a mean over batches whose lengths are
log-normal (median 2,000 tokens, sigma 1) from 100 to 16,000. A sample costs what it costs
Qwen3-0.6B and its teacher Qwen3-8B. No way to divide a batch is better than `floor`: the longest
sample alone, over the mean of the ranks. Then two ranks of this machine train a small model on the
workload `tail`.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from pocl_ds.bench.arguments import parse_integers
from pocl_ds.bench.ranks import run_ranks
from pocl_ds.bench.workloads import WORKLOADS, Workload, write_models
from pocl_ds.curriculum.micro_batches import assign_by_tokens, assign_micro_batches, load_imbalance
from pocl_ds.models.cost import model_shape
from pocl_ds.models.memory import TrainingSetup
from pocl_ds.models.quiet import quiet
from pocl_ds.training.sample_flops import SampleFlops

RANKS = (2, 8, 64)
SAMPLES_PER_RANK, BUDGETS = (4, 16, 64), (16_384, 32_768)  # tokens of a micro-batch
MEDIAN, SIGMA, SHORTEST, LONGEST = 2000, 1.0, 100, 16_000
PROMPT_TOKENS = 100  # of every sample, at most
BATCHES, ROUNDS, STEPS = 8, 2, 4
_QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
STUDENT = {
    **_QWEN3,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
TEACHER = {
    **_QWEN3,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
# What the two ranks share equally -> variant of the worker.
VARIANTS = {"equal tokens": "zero3+equal_tokens", "equal arithmetic": "zero3"}


def run(
    arguments: Sequence[int | str] = (),
    out: Callable[[str], None] = print,
    *,
    work: Workload = WORKLOADS["tail"],
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> dict[str, list[dict[str, Any]]]:
    """Print and return the imbalances, and the optimizer steps of two ranks.

    arguments: numbers of ranks, 2, 8 and 64 by default. Raises RecipeError for one that is not a
    number.
    """
    ranks = parse_integers(arguments, "ranks") or RANKS
    out(
        f"{'ranks':>6}{'samples/rank':>14}{'budget':>9}{'micro-steps':>13}{'tokens':>9}"
        f"{'arithmetic':>12}{'floor':>8}{'ms':>8}"
    )
    rows = []
    for count in ranks:
        for samples in SAMPLES_PER_RANK:
            for budget in BUDGETS:
                row = measure(count, samples, budget)
                rows.append(row)
                out(
                    f"{count:>6}{samples:>14}{budget:>9}{row['micro_steps']:>13.1f}"
                    f"{row['tokens']:>9.3f}{row['arithmetic']:>12.3f}{row['floor']:>8.3f}"
                    f"{row['milliseconds']:>8.1f}"
                )
    out("tokens, arithmetic: the imbalance of what the ranks share equally; ms: to share a batch")
    seconds = _measure_steps(work, out, rounds, steps)
    return {"imbalance": rows, "steps": seconds}


def measure(ranks: int, samples_per_rank: int, max_tokens: int) -> dict[str, Any]:
    """Means over the batches: micro-steps, imbalances, floor, and milliseconds of the dealing."""
    flops = _sample_flops(*(AutoConfig.for_model("qwen3", **shape) for shape in (STUDENT, TEACHER)))
    source, results = np.random.default_rng(0), []
    for _ in range(BATCHES):
        lengths = long_tailed_lengths(source, ranks * samples_per_rank)
        costs = flops.costs(lengths, lengths - np.minimum(lengths // 2, PROMPT_TOKENS))
        limits: dict[str, Any] = {"ranks": ranks, "max_tokens": max_tokens, "packed": True}
        by_tokens = assign_by_tokens(lengths, **limits)
        start = time.perf_counter()
        by_cost = assign_by_tokens(lengths, **limits, costs=costs)
        seconds = time.perf_counter() - start
        results.append(
            (
                len(by_cost[0]),
                load_imbalance(by_tokens, costs, packed=True),
                load_imbalance(by_cost, costs, packed=True),
                max(1.0, float(costs.max() * ranks / costs.sum())),
                1000 * seconds,
            )
        )
    names = ("micro_steps", "tokens", "arithmetic", "floor", "milliseconds")
    means = np.mean(results, axis=0).tolist()
    return {
        "ranks": ranks,
        "samples_per_rank": samples_per_rank,
        "max_tokens": max_tokens,
        **dict(zip(names, means, strict=True)),
    }


def long_tailed_lengths(source: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Tokens of samples, [count]."""
    draws = source.lognormal(np.log(MEDIAN), SIGMA, count)
    return np.clip(draws, SHORTEST, LONGEST).astype(np.int64)


def _measure_steps(
    work: Workload, out: Callable[[str], None], rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Optimizer steps of two ranks, by what they share equally."""
    out(
        f"\n{work.name}: {len(work.lengths)} samples, {work.tokens} tokens, two ranks on "
        f"{os.cpu_count() or 1} cores; {rounds} rounds of {steps} steps in turn"
    )
    lengths = np.array([total for _, total in work.lengths])
    loss_tokens = lengths - np.array([prompt for prompt, _ in work.lengths])
    costs = _sample_flops(*work.configs[::-1]).costs(lengths, loss_tokens)
    measured = _run_in_turn(work, rounds, steps)
    rows = []
    for (label, runs), balanced in zip(measured.items(), (lengths, costs), strict=True):
        assignment = assign_micro_batches(
            lengths,
            ranks=2,
            micro_batch_size=len(lengths) // 2,
            micro_batch_tokens=work.micro_batch_tokens,
            packed=True,
            costs=balanced,
        )
        imbalance = load_imbalance(assignment, costs, packed=True)
        processor = [
            statistics.median(second for run in runs for second in run["processor_seconds"][rank])
            for rank in range(2)
        ]
        seconds = statistics.median(second for run in runs for second in run["seconds"])
        measured_imbalance = max(processor) / statistics.fmean(processor)
        rows.append(
            {
                "label": label,
                "load_imbalance": imbalance,
                "measured_imbalance": measured_imbalance,
                "processor_seconds": processor,
                "seconds": seconds,
            }
        )
        out(
            f"{label:<18} load imbalance {imbalance:.3f}; processor time of the ranks "
            f"{processor[0]:.2f} and {processor[1]:.2f} s a step, imbalance "
            f"{measured_imbalance:.3f}; a step took {seconds:.2f} s"
        )
    return rows


def _run_in_turn(work: Workload, rounds: int, steps: int) -> dict[str, list[Any]]:
    """What the ranks measured in each round, by what they share equally."""
    measured: dict[str, list[Any]] = {label: [] for label in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as name:
        folder = Path(name)
        with quiet():
            write_models(work, folder)
        for _ in range(rounds):
            for label, variant in VARIANTS.items():
                # The finished run of the round before would not run again.
                shutil.rmtree(folder / f"run-{variant}-2", ignore_errors=True)
                result = folder / "out.json"
                record = run_ranks(
                    label,
                    "pocl_ds.bench.balance_worker",
                    [variant, work.name, str(folder), str(steps), str(result)],
                    result,
                    ranks=2,
                    threads=1,
                )
                measured[label].append(record)
    return measured


def _sample_flops(student: Any, teacher: Any) -> SampleFlops:
    """FLOPs of samples in models of these configurations, with the teacher online."""
    return SampleFlops(
        model_shape(student), [model_shape(teacher)], TrainingSetup(1, teacher_mode="online")
    )
