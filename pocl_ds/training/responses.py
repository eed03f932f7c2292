"""The responses that a step trains on: those of the dataset, the teacher or the student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.curriculum.sampler import SamplerPosition
from pocl_ds.data.generated import TokenizedDataset
from pocl_ds.generation.backends import (
    check_backend,
    check_length_dependence,
    longest_sequence,
)
from pocl_ds.generation.subprocess_generator import ALTERNATIVE
from pocl_ds.models.load import load_model_config
from pocl_ds.rollouts.policies import BatchRequest, Policy
from pocl_ds.rollouts.rollout import RolloutStats, RolloutWorker
from pocl_ds.training.data import TrainingData
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.training_run import TrainingRun


class ResponseSource:
    """The policy, and the worker that generates the student's responses if the policy needs one."""

    def __init__(self, policy: Policy, rollout: RolloutWorker | None = None) -> None:
        self.policy, self.rollout = policy, rollout

    def select_batch(
        self, position: SamplerPosition, schedule: TrainingSchedule, data: TrainingData
    ) -> tuple[TokenizedDataset, NDArray[np.int64]]:
        """The dataset that a step trains on, and its rows: those that the curriculum selects, with
        responses that the policy selects.

        With `policy.staleness: 1` this also starts the student's responses of the next step, with
        the weights of now.
        """
        batch = self.policy.select_batch(_batch_request(position, schedule, data))
        next_step = position.step + 1
        is_known = next_step < schedule.known_until(position)
        if self.rollout and self.rollout.config.staleness and is_known:
            request = _batch_request(schedule.sampler.position(next_step), schedule, data)
            if self.policy.will_generate(request):
                self.rollout.generate_ahead(request.rows, request.position)
        return batch

    def metrics(self, *, on_policy: bool, step_seconds: float) -> dict[str, Any]:
        """Metrics of a step whose policy may use the student's responses; empty for other
        policies.
        """
        if self.rollout is None:
            return {}
        stats, self.rollout.stats = self.rollout.stats, RolloutStats()
        return {
            "on_policy": on_policy,
            "rollout_seconds": stats.seconds,
            "rollout_wait_seconds": stats.wait_seconds,
            "weight_sync_seconds": stats.weight_sync_seconds,
            "rollout_tokens": stats.tokens,
            "staleness_steps": stats.staleness_steps,
            "rollout_share": stats.wait_seconds / step_seconds,
            "rollout_tokens_per_second": stats.tokens / stats.seconds if stats.seconds else 0.0,
        }

    def snapshot(self, step: int) -> Callable[[Path], list[Path]] | None:
        """A function that saves the worker's state in a checkpoint; None without a worker."""
        return self.rollout.snapshot(step) if self.rollout else None

    def restore(self, checkpoint: Path) -> None:
        """Give the worker the state that it had when a checkpoint was saved."""
        if self.rollout:
            self.rollout.restore(checkpoint)

    def close(self) -> None:
        """Close the worker."""
        if self.rollout:
            self.rollout.close()


def _batch_request(
    position: SamplerPosition, schedule: TrainingSchedule, data: TrainingData
) -> BatchRequest:
    return BatchRequest(
        position,
        schedule.total_steps,
        data.train,
        schedule.sampler.batch(position.step),
        lambda: schedule.stage_rows(position),
        data.teacher_responses,
    )


def check_rollout_backend(training: TrainingRun, train: TokenizedDataset) -> None:
    """Raise ResourceError or ModelError if the student's rollouts cannot use their backend."""
    policy, student = training.policy, training.student
    check_backend(policy.rollout_backend, ALTERNATIVE)
    check_length_dependence(
        policy.rollout_backend,
        training.student_path,
        load_model_config(
            training.student_path,
            trust_remote_code=student.trust_remote_code,
            revision=student.revision,
        ),
        min(training.max_length, longest_sequence(train, policy.max_new_tokens)),
        ALTERNATIVE,
    )
