"""The ranks of `pocl bench checkpoint`: train a student for a few steps, save it both ways, load
and convert the checkpoint.

    launch/train.sh --ranks R --module pocl_ds.bench.checkpoint_worker WORKLOAD FOLDER STEPS OUT
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from pocl_ds.bench.step_worker import describe_training, model_dtype, write_split
from pocl_ds.bench.workloads import WORKLOADS, Workload
from pocl_ds.compat.deepspeed_private import full_shape
from pocl_ds.config import (
    CheckpointConfig,
    StudentConfig,
    TrackingConfig,
    TrainConfig,
)
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.engines.deepspeed_engine import start_deepspeed
from pocl_ds.runtime import distributed
from pocl_ds.runtime.logs import setup_logging
from pocl_ds.training.build import build_trainer
from pocl_ds.training.checkpoint import Checkpoints
from pocl_ds.training.trainer import Trainer
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.run_dir import RunDirectory


def main(work: Workload, folder: Path, steps: int, out: Path) -> None:
    """Write the seconds of each part, and the checkpoint's bytes per parameter."""
    start_deepspeed()
    trainer = _build_trainer(work, folder, steps)
    engine, directory = trainer.models.engine, folder / "checkpoints"
    parameters = sum(full_shape(parameter).numel() for parameter in engine.module.parameters())
    step_seconds = _time_steps(trainer, 0, steps)

    # Synchronous saves: training waits for the complete save.
    at_once = Checkpoints(directory, CheckpointConfig(keep_last=9), fingerprint="bench")
    save_seconds = [_time(partial(at_once.save, step, engine, is_final=False)) for step in (1, 2)]

    # Asynchronous saves: training waits for the copy and for the completion.
    config = CheckpointConfig(keep_last=9, async_save=True)
    background = Checkpoints(directory, config, fingerprint="bench")
    stall_seconds, steps_during_save, complete_seconds = [], [], []
    for step in (3, 4):
        start = time.perf_counter()
        stall = _time(partial(background.save, step, engine, is_final=False))
        while any(distributed.gather_objects(background.is_writing)):
            steps_during_save += _time_steps(trainer, 0, 1)
        stall_seconds.append(stall + _time(background.finalize_async_save))
        complete_seconds.append(time.perf_counter() - start)

    # Loading, and the conversion on rank 0.
    load_seconds = _time(lambda: at_once.load(engine))
    newest = at_once.step_directory(4)
    convert_seconds, size = 0.0, 0
    if distributed.rank() == 0:
        target = folder / "converted"
        target.mkdir()
        start = time.perf_counter()
        engine.reshard(newest, target)
        convert_seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        shutil.rmtree(target)
    distributed.barrier()

    if distributed.rank() == 0:
        during_save = statistics.median(steps_during_save) if steps_during_save else None
        result = {
            "step": statistics.median(step_seconds),
            "save": save_seconds,
            "stall": stall_seconds,
            "complete": complete_seconds,
            "step_during_save": during_save,
            "load": load_seconds,
            "convert": convert_seconds,
            "bytes_per_parameter": size / parameters,
            "parameters": parameters,
        }
        write_json(out, result)


def _build_trainer(work: Workload, folder: Path, steps: int) -> Trainer:
    run = RunDirectory(folder / "run")
    if distributed.rank() == 0:
        write_split(work, run.data)
    distributed.barrier()
    samples = len(work.lengths)
    train = TrainConfig(
        batch_size=samples,
        micro_batch_size=max(1, samples // distributed.world_size()),
        validate_max_samples=0,
        tracking=TrackingConfig(tensorboard=False),
    )
    student = StudentConfig.model_validate(
        {"model": str(folder / "student"), "dtype": model_dtype()}
    )
    plan = single_stage_plan(
        np.arange(samples), steps=steps, batch_size=samples, temperature=1.0, sft_ratio=1.0
    )
    training = describe_training(run, plan, samples, student, None, train)
    return build_trainer(run, training)


def _time_steps(trainer: Trainer, start: int, count: int) -> list[float]:
    """Seconds of some optimizer steps."""
    seconds = []
    for position in map(trainer.schedule.sampler.position, range(start, start + count)):
        trainer.train_step(position)
        seconds.append(trainer.finish_step()["seconds"])
    return seconds


def _time(action: Callable[[], object]) -> float:
    """Seconds of an action that all ranks take together."""
    distributed.barrier()
    start = time.perf_counter()
    action()
    distributed.barrier()
    return time.perf_counter() - start


if __name__ == "__main__":
    setup_logging(distributed.rank(), world_size=distributed.world_size())
    name, directory, number, result = sys.argv[1:]
    main(WORKLOADS[name], Path(directory), int(number), Path(result))
