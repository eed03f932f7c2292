"""Speed of the student's responses in training: `policy.rollout_backend` vllm against
transformers, as `pocl train` runs them.

A student with 31 million random parameters (workload S of `pocl bench step`) generates responses
to 32 prompts of 51 to 157 tokens in every step. One id in `MEAN_LENGTH` ends a response, so that
lengths vary as real ones do: geometric, at most `MAX_NEW_TOKENS`. Each round trains once
with each backend, for `ROUNDS` rounds; the step in which the generator starts does not count.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.bench.arguments import choose_name
from pocl_ds.bench.ranks import run_ranks
from pocl_ds.bench.workloads import WORKLOADS, Workload, write_models
from pocl_ds.models.quiet import quiet

ROUNDS, STEPS, COPIES = 3, 4, 4
MEAN_LENGTH, MAX_NEW_TOKENS = 48, 192  # tokens of a response
BACKENDS = ("vllm", "transformers")


def run(
    arguments: Sequence[str] = (),
    out: Callable[[str], None] = print,
    *,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, Any]:
    """Print and return the measurements. arguments: the name of a workload, S by default."""
    name = choose_name(arguments, WORKLOADS, "S")
    work, cores = WORKLOADS[name], os.cpu_count() or 1
    # Measure every backend in turn.
    results: dict[str, list[list[dict[str, Any]]]] = {backend: [] for backend in BACKENDS}
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as folder_name:
        folder = Path(folder_name)
        with quiet():
            write_models(work, folder)
        _end_responses_early(work, folder / "student")
        for number in range(rounds):
            for backend, round_results in results.items():
                result = folder / "out.json"
                arguments = [backend, name, folder_name, str(steps)]
                arguments += [str(max_new_tokens), str(number), str(result)]
                worker = "pocl_ds.bench.rollout_worker"
                round_results.append(
                    run_ranks(backend, worker, arguments, result, ranks=1, threads=cores)
                )
    out(
        f"{cores} cores; workload {name}, {COPIES * len(work.lengths)} responses per step, "
        f"{rounds} rounds of {steps} steps in turn"
    )
    for backend, round_results in results.items():
        _print_backend(backend, [step for steps in round_results for step in steps], out)
    # Compare them round by round.
    rates = {
        backend: [[_tokens_per_second(step) for step in steps] for steps in round_results]
        for backend, round_results in results.items()
    }
    ratios = [
        statistics.median(vllm) / statistics.median(transformers)
        for vllm, transformers in zip(*rates.values(), strict=True)
    ]
    out(f"  vllm generates {_spread(ratios, 2)} times as many tokens/s as transformers, by round")
    return {"steps": results, "tokens_per_second": rates, "ratios": ratios}


def _print_backend(backend: str, steps: list[dict[str, Any]], out: Callable[[str], None]) -> None:
    lengths = [length for step in steps for length in step["lengths"]]
    out(
        f"  {backend:<13}{_spread(list(map(_tokens_per_second, steps)), 0)} tokens/s; weight sync "
        f"{_spread([step['weight_sync_seconds'] for step in steps], 2)} s; rollout "
        f"{_spread([100 * step['rollout_share'] for step in steps], 0)}% of a step; responses of "
        f"{min(lengths)}..{max(lengths)} tokens, mean {statistics.fmean(lengths):.0f}"
    )


def _end_responses_early(work: Workload, model: Path) -> None:
    """Make one id in MEAN_LENGTH an EOS token: a model with random weights samples all ids with
    about the same probability.
    """
    size = int(work.student["vocab_size"])
    stops = np.random.default_rng(0).choice(
        np.arange(3, size), max(1, size // MEAN_LENGTH), replace=False
    )
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, *stops.tolist()], "pad_token_id": 2})
    )


def _tokens_per_second(step: dict[str, Any]) -> float:
    """Tokens per second of generation, without the weight sync."""
    return float(step["rollout_tokens"]) / (
        float(step["rollout_seconds"]) - float(step["weight_sync_seconds"])
    )


def _spread(values: Sequence[float], digits: int) -> str:
    """Median (min..max)."""
    median, smallest, largest = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({smallest}..{largest})"
