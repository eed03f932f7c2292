"""What the next optimizer steps train on, made ahead of time where the policy allows it."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config.loss import Writer
from pocl_ds.curriculum.sampler import SamplerPosition
from pocl_ds.data.batches import Batch
from pocl_ds.data.generated import TokenizedDataset
from pocl_ds.runtime import sequence_parallel
from pocl_ds.training.data import TrainingData
from pocl_ds.training.models import TrainingModels
from pocl_ds.training.prefetch import Prefetcher
from pocl_ds.training.request_ahead import StagedBatch
from pocl_ds.training.responses import ResponseSource
from pocl_ds.training.schedule import TrainingSchedule

# The ranks compare what they train on so many optimizer steps before they do.
STEPS_AHEAD = 2


@dataclass(frozen=True)
class StepPlan:
    """The global batch of one optimizer step, and this rank's part of it."""

    position: SamplerPosition
    dataset: TokenizedDataset
    rows: NDArray[np.int64]  # of the dataset: the global batch
    micro_batches: tuple[NDArray[np.int64], ...]  # rows of this rank
    writer: Writer  # of the responses
    loss_weight: float  # of all loss tokens, see `TrainingData.loss_weight`
    # Weight in the loss of each sample of each micro-batch; None if all are 1.
    sample_weights: tuple[NDArray[np.float32], ...] | None = None
    damage: str | None = None  # why the teacher's outputs of this rank's rows are not available
    teachers: tuple[int, ...] = ()  # number of the teacher of each micro-batch
    sample_teachers: NDArray[np.int64] | None = None  # of each row, if domains have their own
    load_imbalance: float = 1.0  # of the ranks, see `curriculum.load_imbalance`

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample of the global batch."""
        return np.asarray(self.dataset.total_tokens[self.rows], np.int64)

    @property
    def loss_tokens(self) -> int:
        """Loss tokens of the global batch."""
        return int(self.sample_loss_tokens.sum())

    @property
    def sample_loss_tokens(self) -> NDArray[np.int64]:
        """Loss tokens of each sample of the global batch."""
        return np.asarray(self.dataset.loss_tokens[self.rows], np.int64)

    @property
    def ids_digest(self) -> str:
        """A short digest of the sample ids in order: equal runs show equal digests."""
        ids = self.dataset.ids[self.rows].tolist()
        return hashlib.sha256(b"\n".join(ids)).hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """What must be equal on all ranks: ranks that do different things would hang."""
        return {
            "step": self.position.step,
            "stage": self.position.stage,
            "micro-batches": len(self.micro_batches),
            "tokens": int(self.lengths.sum()),
            "loss tokens": self.loss_tokens,
            "loss weight": self.loss_weight,
            "load imbalance": self.load_imbalance,
            "teachers": list(self.teachers),
        }


class StepBatches:
    """The plans and micro-batches of consecutive optimizer steps.

    With a stateless policy a background thread makes, for each step, its micro-batches and then the
    plan of the step that comes `STEPS_AHEAD` later. It may start at any step, as after a resume.
    With another policy the batch of a step is known only when it begins, and the thread makes the
    micro-batches of that step alone.
    """

    def __init__(
        self,
        responses: ResponseSource,
        schedule: TrainingSchedule,
        data: TrainingData,
        models: TrainingModels,
    ) -> None:
        self.responses, self.schedule = responses, schedule
        self.data, self.models = data, models
        self.works_ahead = responses.policy.stateless
        # Plans that no rank has compared with the others yet.
        self.unchecked: list[StepPlan] = []
        self._plans: deque[StepPlan] = deque()  # of the next steps
        self._prefetcher: Prefetcher[StepPlan | StagedBatch] | None = None
        self._items: Iterator[StepPlan | StagedBatch] | None = None  # of the prefetcher

    def select(self, position: SamplerPosition) -> StepPlan:
        """The plan of a step, which becomes the current one."""
        if not self.works_ahead:
            self.close()
            plan = self._plan(position)
            self.unchecked = [plan]
            self._prefetch(self._stage_each(plan))
            return plan
        if not self._plans or self._plans[0].position != position:
            self._start(position)
        return self._plans.popleft()

    def micro_batches(self, plan: StepPlan) -> Iterator[Batch]:
        """The micro-batches of the current plan on this rank's device."""
        for _ in plan.micro_batches:
            staged = next(self._made_items)
            assert isinstance(staged, StagedBatch)
            yield self.data.receive(staged)

    def plan_ahead(self, position: SamplerPosition) -> StepPlan | None:
        """The plan of the step `STEPS_AHEAD` after the current one, whose micro-batches are used
        up; None if there is no such step, or its batch is not known yet.
        """
        end = self.schedule.known_until(position)
        if not self.works_ahead or position.step + STEPS_AHEAD >= end:
            return None
        plan = next(self._made_items)
        assert isinstance(plan, StepPlan)
        self._plans.append(plan)
        return plan

    def close(self) -> None:
        """End the background thread."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._prefetcher = self._items = None
        self._plans.clear()

    @property
    def _made_items(self) -> Iterator[StepPlan | StagedBatch]:
        assert self._items is not None, "no step was selected"
        return self._items

    def _prefetch(self, items: Iterator[StepPlan | StagedBatch]) -> None:
        """Start the thread that makes these items."""
        self._prefetcher = Prefetcher(items)
        self._items = self.data.request_ahead(self._prefetcher)

    def _stage_each(self, plan: StepPlan) -> Iterator[StagedBatch]:
        """Make the micro-batches of a plan."""
        for number, rows in enumerate(plan.micro_batches):
            weights = None if plan.sample_weights is None else plan.sample_weights[number]
            yield self.data.stage(plan.dataset, rows, plan.teachers[number], weights, trains=True)

    def _start(self, position: SamplerPosition) -> None:
        """Start the thread at a step."""
        self.close()
        end = self.schedule.known_until(position)
        self._prefetch(self._make_items(position.step, end))
        last = min(position.step + STEPS_AHEAD, end)
        for _ in range(position.step, last):
            plan = next(self._made_items)
            assert isinstance(plan, StepPlan)
            self._plans.append(plan)
        self.unchecked = list(self._plans)

    def _make_items(self, first: int, end: int) -> Iterator[StepPlan | StagedBatch]:
        """The plans of the first steps; then for each step before `end` its micro-batches and a
        later plan.
        """
        position = self.schedule.sampler.position
        plans: deque[StepPlan] = deque()
        for step in range(first, end + STEPS_AHEAD):
            if step >= first + STEPS_AHEAD:
                current = plans.popleft()
                yield from self._stage_each(current)
            if step < end:
                plans.append(self._plan(position(step)))
                yield plans[-1]

    def _plan(self, position: SamplerPosition) -> StepPlan:
        """Select the batch of a step, and divide it into micro-batches."""
        dataset, rows = self.responses.select_batch(position, self.schedule, self.data)
        sample_teachers = self.data.sample_teachers(dataset, rows)
        numbers = self.models.teacher_numbers(position.stage, sample_teachers, rows)
        costs = self.data.batch_costs(dataset, rows, numbers)
        assigned = self.data.micro_batches(costs, sample_teachers)
        micro_batches = tuple(rows[members] for members in assigned.members)
        # A generated response has the weight of its prompt's sample.
        weights, stage_weights = None, self.schedule.stage(position).weights
        if stage_weights is not None:
            prompts = ([dataset.prompt_source(int(row))[1] for row in m] for m in micro_batches)
            weights = tuple(stage_weights[np.array(m, np.int64)] for m in prompts)
        # The ranks that share these rows divide the checks of the teacher's outputs.
        checked = np.concatenate(micro_batches)[
            sequence_parallel.part() :: sequence_parallel.size()
        ]
        return StepPlan(
            position,
            dataset,
            rows,
            micro_batches,
            writer=self.data.writer_of(dataset),
            sample_weights=weights,
            damage=self.models.teacher.find_damage(dataset.name, checked),
            teachers=tuple(assigned.teachers),
            sample_teachers=sample_teachers,
            load_imbalance=assigned.load_imbalance,
            loss_weight=self.data.loss_weight(dataset, rows),
        )
