"""The ranks of `pocl bench checkpoint`: trains a student a few steps, saves it both ways, loads and
converts what was saved.

    launch/train.sh --ranks R --module pocl_ds.bench.checkpoint_worker WORKLOAD FOLDER STEPS OUT
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.bench.step_worker import precision, write_split
from pocl_ds.bench.workloads import WORKLOADS, Workload
from pocl_ds.config import (
    CheckpointConfig,
    LossConfig,
    StudentConfig,
    TrackingConfig,
    TrainConfig,
)
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.engines.engine import start_deepspeed
from pocl_ds.runtime import distributed
from pocl_ds.runtime.tracking import setup_logging
from pocl_ds.training import build
from pocl_ds.training.checkpoint import PREFIX, Checkpoints
from pocl_ds.training.trainer import StopFlag, Trainer
from pocl_ds.workflow.run_dir import RunDirectory, write_json


def main(work: Workload, folder: Path, steps: int, out: Path) -> None:
    """Write the seconds of each part, and the checkpoint's bytes a parameter."""
    start_deepspeed()
    trainer = _trainer(work, folder, steps)
    parameters = sum(
        int(getattr(p, "ds_numel", p.numel())) for p in trainer.engine.module.parameters()
    )
    plain = _steps(trainer, 0, steps)
    directory = folder / "checkpoints"
    at_once = Checkpoints(directory, CheckpointConfig(keep_last=9), fingerprint="bench")
    saved = [
        _timed(lambda step=step: at_once.save(step, trainer.engine, last_chance=False))
        for step in (1, 2)
    ]
    behind = Checkpoints(
        directory, CheckpointConfig(keep_last=9, async_save=True), fingerprint="bench"
    )
    stalls, meanwhile, whole = [], [], []
    for step in (3, 4):
        begin = time.perf_counter()
        stalls.append(
            _timed(lambda step=step: behind.save(step, trainer.engine, last_chance=False))
        )
        while any(distributed.gather_objects(behind.writing)):
            meanwhile += _steps(trainer, 0, 1)
        stalls[-1] += _timed(behind.settle)
        whole.append(time.perf_counter() - begin)
    loaded = _timed(lambda: at_once.load(trainer.engine))
    converted, size = 0.0, 0
    newest = directory / f"{PREFIX}{4:08d}"
    if distributed.rank() == 0:
        target = folder / "converted"
        target.mkdir()
        begin = time.perf_counter()
        trainer.engine.reshard(newest, target)
        converted = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        shutil.rmtree(target)
    distributed.barrier()
    if distributed.rank() == 0:
        write_json(
            out,
            {
                "step": statistics.median(plain),
                "save": saved,
                "stall": stalls,
                "whole": whole,
                "step_meanwhile": statistics.median(meanwhile) if meanwhile else None,
                "load": loaded,
                "convert": converted,
                "bytes_per_parameter": size / parameters,
                "parameters": parameters,
            },
        )


def _trainer(work: Workload, folder: Path, steps: int) -> Trainer:
    run = RunDirectory(folder / "run")
    if distributed.rank() == 0:
        write_split(work, run.data)
    distributed.barrier()
    count = len(work.lengths)
    train = TrainConfig(
        batch_size=count,
        micro_batch_size=max(1, count // distributed.world_size()),
        validate_max_samples=0,
        tracking=TrackingConfig(tensorboard=False),
    )
    student = StudentConfig.model_validate({"model": str(folder / "student"), "dtype": precision()})
    plan = single_stage_plan(
        np.arange(count), steps=steps, batch_size=count, temperature=1.0, sft_ratio=1.0
    )
    job = build.Job(
        run.train,
        "bench",
        "bench",
        plan,
        np.arange(count),
        student.model,
        student,
        (),
        None,
        LossConfig(name="sft"),
        train,
        0,
    )
    return build.make_trainer(run, job)


def _steps(trainer: Trainer, first: int, count: int) -> list[float]:
    return [
        trainer._step(trainer.sampler.at(step), StopFlag())[0]["seconds"]
        for step in range(first, first + count)
    ]


def _timed(action: Any) -> float:
    distributed.barrier()
    begin = time.perf_counter()
    action()
    distributed.barrier()
    return time.perf_counter() - begin


if __name__ == "__main__":
    setup_logging(distributed.rank(), world_size=distributed.world_size())
    name, directory, number, result = sys.argv[1:]
    main(WORKLOADS[name], Path(directory), int(number), Path(result))
