"""Stage, learning rate, validation and checkpoints of each optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import TrainConfig
from pocl_ds.curriculum.plan import Plan, Stage
from pocl_ds.curriculum.sampler import Sampler, SamplerPosition
from pocl_ds.curriculum.schedules import learning_rate


@dataclass(frozen=True)
class TrainingSchedule:
    """The plan, its sampler, and the intervals of the recipe. A step depends on these and its
    number alone, so that a training can resume anywhere.
    """

    plan: Plan
    sampler: Sampler
    train: TrainConfig
    # Before this stage and each later one, from 0, the student ranks the samples again.
    first_ranked_stage: float = math.inf
    # Whether batches may be made before their stage begins.
    prepares_next_stage: bool = True

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return self.sampler.seed

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return self.plan.total_steps

    def stage(self, position: SamplerPosition) -> Stage:
        """The stage of a step."""
        return self.plan.stages[position.stage]

    def stage_rows(self, position: SamplerPosition) -> NDArray[np.int64]:
        """All rows of the stage of a step, easiest first."""
        return np.asarray(self.stage(position).sample_ids)

    def starts_ranked_stage(self, position: SamplerPosition) -> bool:
        """Whether a step is the first one of a stage that the current student ranks."""
        return position.step_in_stage == 0 and position.stage >= self.first_ranked_stage

    def known_until(self, position: SamplerPosition) -> int:
        """The step before which all batches are known at a step: the first step of the next stage
        that the student ranks, or whose batches must wait for it, or the end of the plan.
        """
        step = position.step - position.step_in_stage
        for stage in self.plan.stages[position.stage :]:
            step += stage.steps
            if stage.index + 1 >= self.first_ranked_stage or not self.prepares_next_stage:
                break
        return step

    def learning_rate(self, position: SamplerPosition) -> float:
        """Learning rate of a step (docs/method.md, eq. 8)."""
        step, total = position.step, self.total_steps
        if self.train.lr_restart == "per_stage":
            step, total = position.step_in_stage, self.stage(position).steps
        return learning_rate(
            step,
            total,
            lr=self.train.lr,
            min_lr=self.train.min_lr,
            warmup=self.train.warmup_steps,
        )

    def restarts_optimizer(self, position: SamplerPosition) -> bool:
        """Whether the optimizer restarts before a step: at the start of every stage but the
        first, if train.lr_restart asks for it.
        """
        starts_stage = position.stage > 0 and position.step_in_stage == 0
        return starts_stage and self.train.lr_restart == "per_stage"

    def ends_stage(self, position: SamplerPosition) -> bool:
        """Whether a step is the last one of its stage."""
        return position.step_in_stage + 1 == self.stage(position).steps

    def validates_after(self, position: SamplerPosition) -> bool:
        """Whether the student is validated after a step."""
        interval = self.train.validate_every_n_steps
        is_due = interval is not None and (position.step + 1) % interval == 0
        return is_due or self.ends_stage(position)

    def saves_after(self, position: SamplerPosition) -> bool:
        """Whether a checkpoint is saved after a step."""
        done, config = position.step + 1, self.train.checkpoint
        is_due = done == self.total_steps or done % config.every_n_steps == 0
        # An interrupted ranking continues with the weights that began it.
        next_is_ranked = position.stage + 1 >= self.first_ranked_stage
        return is_due or (self.ends_stage(position) and (config.keep_best or next_is_ranked))
