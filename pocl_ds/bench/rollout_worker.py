"""One training of `pocl bench rollout`, in which the student writes every step's responses.

launch/train.sh --ranks 1 --module pocl_ds.bench.rollout_worker WRITER WORKLOAD FOLDER STEPS MOST
ROUND OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.bench.rollout import COPIES
from pocl_ds.bench.step_worker import precision, write_split
from pocl_ds.bench.workloads import WORKLOADS, Workload
from pocl_ds.config import (
    CheckpointConfig,
    LossConfig,
    PolicyConfig,
    StudentConfig,
    TeacherConfig,
    TrackingConfig,
    TrainConfig,
)
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.curriculum.sampler import Position
from pocl_ds.data.generated import Written
from pocl_ds.rollouts.policies import Rows
from pocl_ds.runtime import distributed
from pocl_ds.runtime.tracking import read_metrics, setup_logging
from pocl_ds.training import build
from pocl_ds.training.trainer import Trainer
from pocl_ds.workflow.run_dir import RunDirectory, write_json


def main(
    writer: str, work: Workload, folder: Path, steps: int, most: int, number: int, out: Path
) -> None:
    """Write the records of `steps` steps after the one in which the writer is opened, each with its
    responses' lengths.
    """
    run = RunDirectory(folder / f"run-{writer}-{number}")
    write_split(work, run.data, COPIES)
    trainer = _trainer(writer, work, folder, run, steps + 1, most, seed=number)
    lengths = _watched(trainer)
    trainer.run()
    records = [
        record for record in read_metrics(run.train / "metrics.jsonl") if record["kind"] == "step"
    ]
    names = (
        "rollout_seconds",
        "rollout_refresh_seconds",
        "rollout_tokens",
        "rollout_share",
        "seconds",
    )
    found: list[dict[str, Any]] = [{name: record[name] for name in names} for record in records]
    write_json(
        out, [{**one, "lengths": each} for one, each in zip(found, lengths, strict=True)][1:]
    )


def _trainer(
    writer: str,
    work: Workload,
    folder: Path,
    run: RunDirectory,
    steps: int,
    most: int,
    *,
    seed: int,
) -> Trainer:
    count, kind = COPIES * len(work.lengths), precision()
    train = TrainConfig(
        engine="torch",
        batch_size=count,
        micro_batch_size=len(work.lengths),
        validate_max_samples=0,
        checkpoint=CheckpointConfig(every_n_steps=10**9),
        tracking=TrackingConfig(tensorboard=False),
    )
    teacher = TeacherConfig.model_validate({"model": str(folder / "teacher"), "dtype": kind})
    student = StudentConfig.model_validate({"model": str(folder / "student"), "dtype": kind})
    policy = PolicyConfig.model_validate(
        {"name": "gkd", "lmbda": 1.0, "rollout": writer, "max_new_tokens": most}
    )
    plan = single_stage_plan(
        np.arange(count), steps=steps, batch_size=count, temperature=1.0, sft_ratio=0.0
    )
    job = build.Job(
        run.train,
        "bench",
        "bench",
        plan,
        np.arange(count),
        student.model,
        student,
        (teacher.model,),
        teacher,
        LossConfig(name="fkl"),
        train,
        seed,
        policy=policy,
        longest=most + max(prompt for prompt, _ in work.lengths),
    )
    return build.make_trainer(run, job)


def _watched(trainer: Trainer) -> list[list[int]]:
    """The lengths of each step's responses, filled in while the training runs."""
    lengths: list[list[int]] = []
    policy: Any = trainer.policy
    write = policy.write

    def watch(rows: Rows, position: Position) -> Written:
        written: Written = write(rows, position)
        lengths.append((written.total_tokens - written.prompt_tokens).tolist())
        return written

    policy.write = watch
    return lengths


if __name__ == "__main__":
    setup_logging(distributed.rank(), world_size=distributed.world_size())
    kind, workload, directory, count, limit, turn, result = sys.argv[1:]
    main(
        kind, WORKLOADS[workload], Path(directory), int(count), int(limit), int(turn), Path(result)
    )
