"""One way of a whole POCL run for `pocl bench teacher`: what teaching and training took, and
reading with a cold page cache.

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

from pocl_ds.bench.step_worker import make_training
from pocl_ds.bench.workloads import WORKLOADS, Workload
from pocl_ds.curriculum.plan import build_plan
from pocl_ds.data.tokenized import EncodedSplit
from pocl_ds.runtime import distributed
from pocl_ds.runtime.tracking import read_metrics, setup_logging
from pocl_ds.teachers.cache import TeacherStore
from pocl_ds.workflow.run_dir import RunDirectory, write_json

STAGES, READS = 4, 10


def main(variant: str, work: Workload, folder: Path, epochs: int, out: Path) -> None:
    """Four stages of `epochs` epochs over four batches, the teacher live or stored."""
    run, count = RunDirectory(folder / f"whole-{variant}"), len(work.lengths)
    begin = time.perf_counter()
    plan = build_plan(
        np.arange(count * STAGES), num_subsets=STAGES, epochs_per_stage=epochs, batch_size=count
    )
    training = make_training(variant, work, folder, run, plan, copies=STAGES)
    taught = time.perf_counter()
    training().run()
    ended = time.perf_counter()
    read = _cold_reads(run, count) if variant.endswith("+stored") else None
    if distributed.rank() == 0:
        steps = [record["seconds"] for record in read_metrics(run.train / "metrics.jsonl")]
        write_json(
            out,
            {
                "cache-teacher": taught - begin,
                "train": ended - taught,
                "step": statistics.median(steps),
                "read": read,
                "steps": len(steps),
            },
        )


def _cold_reads(run: RunDirectory, count: int) -> list[float]:
    """Seconds that the states of a batch take to be checked and read, from disk."""
    split = EncodedSplit.open(run.data, "train")
    rows = np.arange(count)
    found = []
    for _ in range(READS):
        for path in run.teacher_cache.glob("*.bin"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        store = TeacherStore(run.teacher_cache, [split], fingerprint="bench")
        begin = time.perf_counter()
        store.fault("train", rows)
        store.read("train", tuple(rows.tolist()))
        found.append(time.perf_counter() - begin)
    return found


if __name__ == "__main__":
    setup_logging(distributed.rank(), world_size=distributed.world_size())
    name, workload, directory, number, result = sys.argv[1:]
    main(name, WORKLOADS[workload], Path(directory), int(number), Path(result))
