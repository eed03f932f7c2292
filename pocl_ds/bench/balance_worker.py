"""Ranks of `pocl bench balance`: the processor time that each one needs for an optimizer step.

launch/train.sh --ranks R --module pocl_ds.bench.balance_worker VARIANT WORKLOAD FOLDER STEPS OUT

A rank that waits for others needs no processor, so that the times show how the work was shared also
on a machine that others use. Variants: see `step_worker`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pocl_ds.bench.step_worker import time_trainer
from pocl_ds.bench.workloads import WORKLOADS
from pocl_ds.curriculum.sampler import SamplerPosition
from pocl_ds.runtime import distributed
from pocl_ds.training.trainer import Trainer
from pocl_ds.workflow.files import write_json


def main(variant: str, workload: str, folder: Path, steps: int, out: Path) -> None:
    """Write the seconds of each step and those of each rank's processor, after one step that does
    not count.
    """
    processor_seconds: list[float] = []
    train_step = Trainer.train_step

    def timed_step(self: Trainer, position: SamplerPosition) -> None:
        start = time.process_time()
        train_step(self, position)
        processor_seconds.append(time.process_time() - start)

    Trainer.train_step = timed_step  # type: ignore[method-assign]
    seconds, _ = time_trainer(variant, WORKLOADS[workload], folder, steps + 1)
    by_rank = distributed.gather_objects(processor_seconds[1:])
    if distributed.rank() == 0:
        write_json(out, {"seconds": seconds[1:], "processor_seconds": by_rank})


if __name__ == "__main__":
    variant_name, workload_name, directory, count, result = sys.argv[1:]
    main(variant_name, workload_name, Path(directory), int(count), Path(result))
