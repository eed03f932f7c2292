"""Time and peak memory of ranking, planning and sampling, from ten thousand to ten million samples.

Each size runs in a separate process, because the peak memory of a process never falls.
Generating ids and scores is not timed, but its memory counts.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.bench.arguments import parse_integers
from pocl_ds.curriculum.plan import build_plan
from pocl_ds.curriculum.ranking import rank_by_difficulty
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.resources import module_command

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
MIN_SAMPLES = 256  # four subsets of one batch of 64


def run(
    sizes: Sequence[int | str] = (), out: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Print and return a row for each number of samples: seconds on one core, memory of the
    process.

    sizes: 10k to 10M by default. Raises RecipeError for a value that is not a number of samples.
    """
    counts = parse_integers(sizes, "samples", minimum=MIN_SAMPLES) or SIZES
    out("rank, plan and sampler on synthetic samples, one process per size, one core")
    out(
        f"{'samples':>10}  {'rank':>8}  {'plan':>8}  {'batch 0':>8}  {'resume':>8}  {'sum':>8}  "
        f"{'peak':>9}"
    )
    rows = []
    for size in counts:
        row = _measure_in_process(size)
        rows.append(row)
        steps = ("rank", "plan", "first_batch", "resumed_batch")
        cells = "  ".join(f"{row[name]:>6.2f} s" for name in steps)
        out(
            f"{size:>10}  {cells}  {sum(row[name] for name in steps):>6.2f} s  "
            f"{row['peak_mib']:>5.0f} MiB"
        )
    out("batch 0: a new sampler and its first batch")
    out("resume: a new sampler over the order on disk, and a batch in the middle of the last epoch")
    return rows


def measure(size: int) -> dict[str, Any]:
    """Seconds of each part at one size, and this process's peak memory in MiB."""
    source = np.random.default_rng(0)
    ids = np.char.mod("sample-%08d", source.permutation(size)).astype("S15")
    # A tenth of the responses share nothing with the reference, as with a weak student; ROUGE-L
    # has few distinct values.
    rouge = np.where(source.random(size) < 0.1, 0.0, source.integers(0, 4000, size) / 4000)
    entropy = source.gamma(4.0, 0.7, size)
    row: dict[str, Any] = {"samples": size}
    start = time.perf_counter()
    ranking = rank_by_difficulty(rouge, entropy, ids)
    row["rank"] = time.perf_counter() - start

    start = time.perf_counter()
    plan = build_plan(ranking.order)
    row["plan"] = time.perf_counter() - start

    start = time.perf_counter()
    Sampler(plan, 0).batch(0)
    row["first_batch"] = time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "order.npy"
        np.save(path, ranking.order)
        tree = plan.to_json()
        start = time.perf_counter()
        order = np.load(path, mmap_mode="r")
        resumed = type(plan).from_json(tree, order)
        step = resumed.total_steps - resumed.stages[-1].steps_per_epoch // 2
        Sampler(resumed, 0).batch(step)
        row["resumed_batch"] = time.perf_counter() - start
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def _measure_in_process(size: int) -> dict[str, Any]:
    one_core = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.run(
        [*module_command("pocl_ds.bench.scale"), str(size)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **one_core},
    )
    row: dict[str, Any] = json.loads(process.stdout)
    return row


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
