"""One complete run of `pocl bench teacher`: seconds of caching and training, and of reading the
cache with a cold page cache.

launch/train.sh --ranks R --threads T --module pocl_ds.bench.teacher_worker VARIANT WORKLOAD FOLDER
EPOCHS OUT
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from pocl_ds.bench.step_worker import prepare_training
from pocl_ds.bench.workloads import WORKLOADS, Workload
from pocl_ds.curriculum.plan import build_plan
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.runtime import distributed
from pocl_ds.runtime.logs import setup_logging
from pocl_ds.runtime.metrics import read_metrics
from pocl_ds.teachers.cache_plan import open_cache
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.run_dir import RunDirectory

STAGES, READS = 4, 10


def main(variant: str, work: Workload, folder: Path, epochs: int, out: Path) -> None:
    """Four stages of `epochs` epochs over four batches, with an online or a cached teacher."""
    run, samples = RunDirectory(folder / f"run-{variant}"), len(work.lengths)
    start = time.perf_counter()
    plan = build_plan(
        np.arange(samples * STAGES), num_subsets=STAGES, epochs_per_stage=epochs, batch_size=samples
    )
    build_trainer = prepare_training(variant, work, folder, run, plan, copies=STAGES)
    cached = time.perf_counter()
    build_trainer().run()
    trained = time.perf_counter()
    read_seconds = _time_cold_reads(run, samples) if variant.endswith("+cached") else None
    if distributed.rank() == 0:
        steps = [record["seconds"] for record in read_metrics(run.train / "metrics.jsonl")]
        result = {
            "cache-teacher": cached - start,
            "train": trained - cached,
            "step": statistics.median(steps),
            "read": read_seconds,
            "steps": len(steps),
        }
        write_json(out, result)


def _time_cold_reads(run: RunDirectory, samples: int) -> list[float]:
    """Seconds to verify and read a batch's hidden states from disk."""
    split = TokenizedSplit.open(run.data, "train")
    rows, seconds = np.arange(samples), []
    for _ in range(READS):
        # Drop the files from the page cache.
        for path in run.teacher_cache.glob("*/*.bin"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        cache = open_cache(run.teacher_cache, "bench", "teacher", [split])
        start = time.perf_counter()
        cache.find_damage("train", rows)
        cache.read("train", tuple(rows.tolist()))
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    setup_logging(distributed.rank(), world_size=distributed.world_size())
    name, workload, directory, number, result = sys.argv[1:]
    main(name, WORKLOADS[workload], Path(directory), int(number), Path(result))
