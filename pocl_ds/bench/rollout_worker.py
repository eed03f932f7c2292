"""One training of `pocl bench rollout`, in which the student generates the responses of every step.

launch/train.sh --ranks 1 --module pocl_ds.bench.rollout_worker BACKEND WORKLOAD FOLDER STEPS
MAX_NEW_TOKENS ROUND OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from pocl_ds.bench.rollout import COPIES
from pocl_ds.bench.step_worker import describe_training, model_dtype, write_split
from pocl_ds.bench.workloads import WORKLOADS, Workload
from pocl_ds.config import (
    CheckpointConfig,
    PolicyConfig,
    StudentConfig,
    TeacherConfig,
    TrackingConfig,
    TrainConfig,
)
from pocl_ds.curriculum.plan import single_stage_plan
from pocl_ds.curriculum.sampler import SamplerPosition
from pocl_ds.data.generated import GeneratedBatch
from pocl_ds.rollouts.policies import Rows
from pocl_ds.runtime import distributed
from pocl_ds.runtime.logs import setup_logging
from pocl_ds.runtime.metrics import read_metrics
from pocl_ds.training.build import build_trainer
from pocl_ds.training.trainer import Trainer
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.run_dir import RunDirectory

METRICS = ("rollout_seconds", "weight_sync_seconds", "rollout_tokens", "rollout_share", "seconds")


def main(
    backend: str,
    work: Workload,
    folder: Path,
    steps: int,
    max_new_tokens: int,
    round_number: int,
    out: Path,
) -> None:
    """Write the metrics of `steps` steps after the one in which the generator starts, each with the
    lengths of its responses.
    """
    run = RunDirectory(folder / f"run-{backend}-{round_number}")
    write_split(work, run.data, COPIES)
    trainer = _build_trainer(
        backend, work, folder, run, steps + 1, max_new_tokens, seed=round_number
    )
    lengths = _record_lengths(trainer)
    trainer.run()
    records = read_metrics(run.train / "metrics.jsonl")
    results: list[dict[str, Any]] = [
        {**{name: record[name] for name in METRICS}, "lengths": step_lengths}
        for record, step_lengths in zip(records, lengths, strict=True)
    ]
    write_json(out, results[1:])


def _build_trainer(
    backend: str,
    work: Workload,
    folder: Path,
    run: RunDirectory,
    steps: int,
    max_new_tokens: int,
    *,
    seed: int,
) -> Trainer:
    # A batch with every sample, and no checkpoint or validation.
    samples, dtype = COPIES * len(work.lengths), model_dtype()
    train = TrainConfig(
        engine="torch",
        batch_size=samples,
        micro_batch_size=len(work.lengths),
        validate_max_samples=0,
        checkpoint=CheckpointConfig(every_n_steps=10**9),
        tracking=TrackingConfig(tensorboard=False),
    )
    teacher = TeacherConfig.model_validate({"model": str(folder / "teacher"), "dtype": dtype})
    student = StudentConfig.model_validate({"model": str(folder / "student"), "dtype": dtype})
    # The student generates the responses of every step.
    policy = PolicyConfig.model_validate(
        {
            "name": "gkd",
            "lmbda": 1.0,
            "rollout_backend": backend,
            "max_new_tokens": max_new_tokens,
        }
    )
    plan = single_stage_plan(
        np.arange(samples), steps=steps, batch_size=samples, temperature=1.0, sft_ratio=0.0
    )
    training = describe_training(
        run,
        plan,
        samples,
        student,
        teacher,
        train,
        seed,
        policy=policy,
        max_length=max_new_tokens + max(prompt for prompt, _ in work.lengths),
    )
    return build_trainer(run, training)


def _record_lengths(trainer: Trainer) -> list[list[int]]:
    """The lengths of each step's responses; the list is filled while the training runs."""
    lengths: list[list[int]] = []
    policy: Any = trainer.responses.policy
    generate = policy.generate

    def generate_and_record(rows: Rows, position: SamplerPosition) -> GeneratedBatch:
        generated: GeneratedBatch = generate(rows, position)
        lengths.append((generated.total_tokens - generated.prompt_tokens).tolist())
        return generated

    policy.generate = generate_and_record
    return lengths


if __name__ == "__main__":
    setup_logging(distributed.rank(), world_size=distributed.world_size())
    backend, workload, directory, count, limit, turn, result = sys.argv[1:]
    work = WORKLOADS[workload]
    main(backend, work, Path(directory), int(count), int(limit), int(turn), Path(result))
