"""Ranks of test_faults: a training in which rank 1 behaves differently from step 2 on.

launch/train.sh --ranks 2 --module fault_worker FAULT TEACHER STUDENT FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gradient_worker import write_split

from pocl_ds.config import (
    LossConfig,
    StudentConfig,
    TeacherConfig,
    TrackingConfig,
    TrainConfig,
)
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.data.tokenized import SPLIT_FILES
from pocl_ds.engines.deepspeed_engine import start_deepspeed
from pocl_ds.errors import PoclError
from pocl_ds.runtime import distributed
from pocl_ds.runtime.logs import setup_logging
from pocl_ds.training.build import build_trainer
from pocl_ds.training.training_run import TrainingRun
from pocl_ds.workflow.run_dir import RunDirectory


def main(fault: str, teacher: str, student: str, folder: Path) -> None:
    setup_logging(distributed.rank(), world_size=2)
    start_deepspeed()
    run = RunDirectory(folder)
    if distributed.rank() == 0:
        run.data.mkdir(parents=True)
        write_split(run.data)
        for part in SPLIT_FILES:
            (run.data / f"validation.{part}").write_bytes((run.data / f"train.{part}").read_bytes())
    distributed.barrier()
    train = TrainConfig(
        batch_size=12,
        micro_batch_size=2,
        hang_timeout_seconds=10,
        tracking=TrackingConfig(tensorboard=False),
    )
    plan = single_stage_plan(np.arange(12), steps=6, batch_size=12, temperature=1.0, sft_ratio=0.3)
    is_faulty_rank = distributed.rank() == 1
    training = TrainingRun(
        run.train,
        "other" if is_faulty_rank and fault == "recipe" else "one",
        "train",
        plan,
        student,
        StudentConfig(model=student),
        (teacher,),
        TeacherConfig(model=teacher),
        LossConfig(),
        train,
        0,
    )
    trainer = build_trainer(run, training)
    micro_batches = trainer.data.micro_batches

    def faulty_micro_batches(*arguments: Any) -> Any:
        faulty_micro_batches.calls += 1  # type: ignore[attr-defined]
        if is_faulty_rank and faulty_micro_batches.calls > 2:  # type: ignore[attr-defined]
            if fault == "skip":
                own = micro_batches(*arguments)
                return replace(own, members=own.members[1:], teachers=own.teachers[1:])
            if fault == "sleep":
                time.sleep(300)
            if fault == "die":
                os._exit(9)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return micro_batches(*arguments)

    faulty_micro_batches.calls = 0  # type: ignore[attr-defined]
    trainer.data.micro_batches = faulty_micro_batches  # type: ignore[method-assign]
    trainer.run()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    except PoclError as error:
        print(f"fault_worker: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
