"""How fast the student writes responses while it learns: `policy.rollout_backend` vllm against hf, as `pocl
train` runs them.

A student of 31 million random parameters (workload S of `pocl bench step`) writes to 32 prompts of
51 to 157 tokens a step. One id in `MEAN` ends a response, so that lengths are ragged as those of
real ones: geometric, cut at `MOST`. Each contender is a training of its own, in turn, `ROUNDS`
times round; the step in which the writer is opened does not count.
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

from pocl_ds.bench.ranks import run_ranks
from pocl_ds.bench.workloads import WORKLOADS, Workload, write_models
from pocl_ds.errors import RecipeError
from pocl_ds.models.quiet import quiet

ROUNDS, STEPS, COPIES = 3, 4, 4
MEAN, MOST = 48, 192  # tokens of a response
WRITERS = ("vllm", "transformers")


def run(
    arguments: Sequence[str] = (),
    out: Callable[[str], None] = print,
    *,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    most: int = MOST,
) -> dict[str, Any]:
    """Print and return what was measured. arguments: the name of a workload, S where none is given.
    most: tokens a response.
    """
    name = arguments[0] if arguments else "S"
    if len(arguments) > 1 or name not in WORKLOADS:
        raise RecipeError(f"give one workload, {', '.join(WORKLOADS)}, or nothing")
    work, cores = WORKLOADS[name], os.cpu_count() or 1
    found: dict[str, list[list[dict[str, Any]]]] = {writer: [] for writer in WRITERS}
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as folder_name:
        folder = Path(folder_name)
        with quiet():
            write_models(work, folder)
        _end_often(work, folder / "student")
        for number in range(rounds):
            for writer in WRITERS:
                words = [
                    writer,
                    name,
                    folder_name,
                    str(steps),
                    str(most),
                    str(number),
                    str(folder / "out.json"),
                ]
                found[writer].append(
                    run_ranks(
                        writer,
                        "pocl_ds.bench.rollout_worker",
                        words,
                        folder / "out.json",
                        ranks=1,
                        threads=cores,
                    )
                )
    rates = {
        writer: [[_rate(step) for step in part] for part in parts]
        for writer, parts in found.items()
    }
    count = COPIES * len(work.lengths)
    out(
        f"{cores} cores; workload {name}, {count} responses a step, {rounds} rounds of {steps} "
        f"steps in turn"
    )
    for writer, parts in found.items():
        every = [step for part in parts for step in part]
        tokens = [length for step in every for length in step["lengths"]]
        out(
            f"  {writer:<6}{_spread([rate for part in rates[writer] for rate in part], 0)} "
            f"tokens/s; new weights "
            f"{_spread([step['rollout_refresh_seconds'] for step in every], 2)} s; "
            f"{_spread([100 * step['rollout_share'] for step in every], 0)}% of a step; "
            f"responses of {min(tokens)}..{max(tokens)} tokens, {statistics.fmean(tokens):.0f} on "
            f"average"
        )
    ratios = [
        statistics.median(ours) / statistics.median(theirs)
        for ours, theirs in zip(*rates.values(), strict=True)
    ]
    out(f"  vllm writes {_spread(ratios, 2)} times as many tokens a second as hf, by round")
    return {"steps": found, "tokens_per_second": rates, "ratios": ratios}


def _end_often(work: Workload, model: Path) -> None:
    """Let one id in MEAN, drawn at random, end a response: a model of random weights draws all
    alike.
    """
    size = int(work.student["vocab_size"])
    stops = np.random.default_rng(0).choice(np.arange(3, size), max(1, size // MEAN), replace=False)
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, *stops.tolist()], "pad_token_id": 2})
    )


def _rate(step: dict[str, Any]) -> float:
    """Tokens a second of writing alone, without the new weights."""
    return float(step["rollout_tokens"]) / (
        float(step["rollout_seconds"]) - float(step["rollout_refresh_seconds"])
    )


def _spread(values: Sequence[float], digits: int) -> str:
    """Median (least..most)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"
