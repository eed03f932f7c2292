"""The curriculum as a sampler of torch's DataLoader, for training loops other than ours.

    sampler = CurriculumSampler(plan, seed=42, micro_batch_size=4)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler)

It needs no torch: a DataLoader takes any object with `__iter__` and `__len__`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.curriculum.micro_batches import assign_by_count
from pocl_ds.curriculum.plan import Plan, Stage
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.errors import ArtifactError, RecipeError


class CurriculumSampler:
    """Dataset rows in the order of a plan, for one rank: one micro-batch after the other.

    Every rank sees the same global batch of each optimizer step, and takes its own micro-batches of
    it. A micro-step has the samples of that of `pocl train` with the same `train.micro_batch_size`;
    which rank gets which may differ, since `pocl train` knows what a sample costs its models. One
    pass is the whole plan, not one epoch.

    `state_dict` and `load_state_dict` follow torchdata's StatefulDataLoader. A plain DataLoader
    with workers draws rows before they are used, so continue it with `start_at` the number of
    finished optimizer steps.
    """

    def __init__(
        self,
        plan: Plan,
        seed: int,
        *,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        lengths: NDArray[np.int64] | None = None,
    ) -> None:
        """
        Args:
            plan: its order holds rows of the dataset, easiest first.
            seed: of the shuffle within each epoch.
            micro_batch_size: samples of one forward pass on one rank.
            lengths: tokens of each dataset row, [rows]. Samples of similar length then share a
                micro-step; without it they keep the order of the batch.

        Raises:
            RecipeError: the plan's batch cannot be divided among the ranks.
        """
        if micro_batch_size < 1 or plan.batch_size % (world_size * micro_batch_size):
            raise RecipeError(
                f"the plan's batch of {plan.batch_size} samples cannot be divided into "
                f"micro-batches of {micro_batch_size} on {world_size} ranks: change "
                "micro_batch_size, or build the plan with another batch_size"
            )
        if not 0 <= rank < world_size:
            raise RecipeError(f"rank {rank} is not one of {world_size} ranks: count from 0")
        self.plan, self.seed, self.lengths = plan, seed, lengths
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self._sampler = Sampler(plan, seed)
        self._drawn = 0  # rows of this rank, from the start of the plan

    @cached_property
    def identity(self) -> dict[str, Any]:
        """A digest of the plan with its order and sample weights, and the seed: equal samplers draw
        equal batches.
        """
        digest = hashlib.sha256(json.dumps(self.plan.to_json(), sort_keys=True).encode())
        for stage in self.plan.stages:
            digest.update(np.asarray(stage.order, np.int64).tobytes())
            if stage.weights is not None:
                digest.update(stage.weights.tobytes())
        return {"plan": digest.hexdigest(), "seed": self.seed}

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step on one rank."""
        return self.plan.batch_size // self.world_size

    def __len__(self) -> int:
        return self.plan.total_steps * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        """The rows from where the sampler stands; the next iteration starts at the beginning."""
        while self._drawn < len(self):
            step, place = divmod(self._drawn, self.rows_per_step)
            for row in np.concatenate(self.micro_batches(step)[self.rank])[place:]:
                self._drawn += 1
                yield int(row)
        self._drawn = 0

    def micro_batches(self, step: int) -> list[list[NDArray[np.int64]]]:
        """The dataset rows of an optimizer step: [rank][micro-batch] -> [micro_batch_size]."""
        rows = self._sampler.batch(step)
        lengths = np.zeros(len(rows), np.int64) if self.lengths is None else self.lengths[rows]
        places = assign_by_count(
            lengths, ranks=self.world_size, micro_batch_size=self.micro_batch_size, packed=False
        )
        return [[rows[part] for part in of_rank] for of_rank in places]

    def sample_weights(self, step: int, micro_step: int) -> NDArray[np.float32] | None:
        """The weights of this rank's samples in the loss of a micro-batch, [micro_batch_size]; None
        if all are 1. Their mean over the samples of the stage is 1.
        """
        weights = self.stage(step).weights
        if weights is None:
            return None
        return weights[self.micro_batches(step)[self.rank][micro_step]]

    def stage(self, step: int) -> Stage:
        """The stage of an optimizer step, with its temperature and SFT ratio."""
        return self.plan.stages[self._sampler.position(step).stage]

    def start_at(self, step: int) -> None:
        """Continue with optimizer step `step`. Raises RecipeError for a step outside the plan."""
        if not 0 <= step <= self.plan.total_steps:
            raise RecipeError(
                f"step {step} is outside the plan's {self.plan.total_steps} optimizer steps: give "
                "the number of finished ones"
            )
        self._drawn = step * self.rows_per_step

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands. Another number of ranks can continue between two steps."""
        return {
            **self.identity,
            "drawn": self._drawn,
            "micro_batch_size": self.micro_batch_size,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ArtifactError: the state is of another plan or seed, or was taken within an optimizer
                step with other micro-batches.
        """
        if any(state[name] != value for name, value in self.identity.items()):
            raise ArtifactError(
                "the sampler's state belongs to another plan or seed: continue with the plan that "
                "the checkpoint was trained with, or start from the beginning"
            )
        step, place = divmod(state["drawn"], self.plan.batch_size // state["world_size"])
        shape = (state["micro_batch_size"], state["world_size"])
        if place and shape != (self.micro_batch_size, self.world_size):
            raise ArtifactError(
                f"the sampler's state was taken within optimizer step {step + 1} by {shape[1]} "
                f"ranks with micro-batches of {shape[0]}: continue with the same ones"
            )
        self.start_at(step)
        self._drawn += place
