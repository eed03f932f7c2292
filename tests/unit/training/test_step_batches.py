"""Micro-batches that are made ahead of time are those of the step itself, in order."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.config import TrainConfig
from pocl_ds.curriculum.plan import build_plan, single_stage_plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.split_writer import save_split
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.rollouts.policies import BatchRequest, OffPolicy
from pocl_ds.training.data import TrainingData
from pocl_ds.training.layout import Layout
from pocl_ds.training.models import NoTeacher, TrainingModels
from pocl_ds.training.prefetch import Prefetcher
from pocl_ds.training.request_ahead import TeacherRequests
from pocl_ds.training.responses import ResponseSource
from pocl_ds.training.schedule import TrainingSchedule
from pocl_ds.training.step_batches import STEPS_AHEAD, StepBatches

SAMPLES, BATCH, STEPS = 24, 8, 7


class LatePolicy(OffPolicy):
    """A policy whose batch is known only when its step begins, as with the student's responses."""

    def __init__(self) -> None:
        self.selected: list[int] = []

    def select_batch(self, request: BatchRequest) -> Any:
        self.selected.append(request.position.step)
        return super().select_batch(request)


def make(folder: Path, policy: OffPolicy) -> StepBatches:
    source = np.random.default_rng(0)
    samples = [
        source.integers(2, 100, int(source.integers(4, 20))).tolist() for _ in range(SAMPLES)
    ]
    save_split(folder, "train", [f"s{i}" for i in range(SAMPLES)], samples, [2] * SAMPLES)
    split = TokenizedSplit.open(folder, "train")
    plan = single_stage_plan(
        np.arange(SAMPLES), steps=STEPS, batch_size=BATCH, temperature=1.0, sft_ratio=0.0
    )
    train = TrainConfig(batch_size=BATCH, micro_batch_size=2)
    return StepBatches(
        ResponseSource(policy),
        TrainingSchedule(plan, Sampler(plan, 3), train),
        TrainingData(split, None, Layout(False, 0.0), 2),
        TrainingModels(None, NoTeacher()),  # type: ignore[arg-type]
    )


def run(batches: StepBatches, first: int) -> list[tuple[int, list[list[int]]]]:
    """Step, and the tokens of its micro-batches, from a step on."""
    seen = []
    for step in range(first, STEPS):
        position = batches.schedule.sampler.position(step)
        plan = batches.select(position)
        micro_batches = [batch.input_ids.tolist() for batch in batches.micro_batches(plan)]
        seen.append((plan.position.step, micro_batches))
        ahead = batches.plan_ahead(position)
        works_ahead = batches.works_ahead and step + STEPS_AHEAD < STEPS
        assert (ahead.position.step if ahead else None) == (
            step + STEPS_AHEAD if works_ahead else None
        )
    return seen


def expected(batches: StepBatches, first: int) -> list[tuple[int, list[list[int]]]]:
    """The same, made in place: the sampler's rows, divided by length, collated one by one."""
    data, sampler = batches.data, Sampler(batches.schedule.plan, 3)
    steps = []
    for step in range(first, STEPS):
        rows = sampler.batch(step)
        longest_first = rows[np.argsort(-np.asarray(data.train.total_tokens[rows]), kind="stable")]
        groups = longest_first.reshape(-1, 2)
        steps.append((step, [collate(data.train, group).input_ids.tolist() for group in groups]))
    return steps


@pytest.mark.parametrize("first", [0, 4, STEPS - 1])
@pytest.mark.parametrize("policy", [OffPolicy, LatePolicy])
def test_batches_equal_those_made_in_place(
    policy: type[OffPolicy], first: int, tmp_path: Path
) -> None:
    """Also from the step at which a training resumes, and near the end."""
    threads = threading.active_count()
    batches = make(tmp_path, policy())
    assert run(batches, first) == expected(batches, first)
    batches.close()
    assert threading.active_count() == threads


class RequestLog:
    """Takes the place of a teacher on its own ranks."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def encode(self, batch: Batch) -> Tensor:
        return batch.input_ids

    def request(self, encoded: Tensor) -> int:
        self.sent.append(encoded)
        return len(self.sent) - 1


def with_requests(batches: StepBatches) -> RequestLog:
    """Let the outputs of batches be requested, one batch ahead."""
    log: Any = RequestLog()
    batches.data.teacher_requests = TeacherRequests(lambda batch: log, 1)
    recorded: RequestLog = log
    return recorded


@pytest.mark.parametrize("policy", [OffPolicy, LatePolicy])
def test_the_outputs_of_the_next_batch_are_requested_before_this_one_is_used(
    policy: type[OffPolicy], tmp_path: Path
) -> None:
    """Also of the first one of the next step, if that is known."""
    batches = make(tmp_path, policy())
    log, used, per_step = with_requests(batches), 0, BATCH // 2
    for step in range(STEPS):
        position = batches.schedule.sampler.position(step)
        known = STEPS * per_step if batches.works_ahead else (step + 1) * per_step
        for batch in batches.micro_batches(batches.select(position)):
            assert batch.teacher_request == used
            assert torch.equal(log.sent[used], batch.input_ids)
            used += 1
            assert len(log.sent) == min(used + 1, known)
        batches.plan_ahead(position)
    batches.close()


def test_validation_requests_ahead_and_scores_without_the_teacher_do_not(tmp_path: Path) -> None:
    batches = make(tmp_path, OffPolicy())
    log, data = with_requests(batches), batches.data
    groups = [np.arange(n, n + 3) for n in range(0, 12, 3)]
    made = data.batches(data.train, groups, [0] * 4)
    numbers = [(batch.teacher_request, len(log.sent)) for batch in made]
    assert numbers == [(0, 2), (1, 3), (2, 4), (3, 4)]
    made = data.batches(data.train, groups, [0] * 4, runs_teacher=False)
    assert [batch.teacher_request for batch in made] == [None] * 4 and len(log.sent) == 4


def test_a_policy_with_state_is_asked_when_its_step_begins(tmp_path: Path) -> None:
    policy = LatePolicy()
    batches = make(tmp_path, policy)
    for step in range(3):
        plan = batches.select(batches.schedule.sampler.position(step))
        assert batches.unchecked == [plan] and policy.selected == list(range(step + 1))
        assert len(list(batches.micro_batches(plan))) == BATCH // 2
    batches.close()


def test_the_first_steps_are_unchecked(tmp_path: Path) -> None:
    batches = make(tmp_path, OffPolicy())
    batches.select(batches.schedule.sampler.position(2))
    assert [plan.position.step for plan in batches.unchecked] == [2, 3]
    # A step out of turn starts again there.
    plan = batches.select(batches.schedule.sampler.position(5))
    assert plan.position.step == 5 and next(batches.micro_batches(plan)).rows[0] in plan.rows
    batches.close()


def test_an_error_is_raised_where_its_batch_is_used(tmp_path: Path) -> None:
    """The same error, with the batches before it in order, and the thread ends."""
    threads = threading.active_count()
    batches = make(tmp_path, OffPolicy())
    error = OSError("the file is gone")
    broken = batches.data.train.tokens
    bad_row = int(Sampler(batches.schedule.plan, 3).batch(1)[0])

    def tokens(row: int) -> NDArray[np.uint32]:
        if row == bad_row:
            raise error
        return broken(row)

    object.__setattr__(batches.data.train, "tokens", tokens)
    position = batches.schedule.sampler.position
    plan = batches.select(position(0))
    assert len(list(batches.micro_batches(plan))) == BATCH // 2
    batches.plan_ahead(position(0))
    plan = batches.select(position(1))
    with pytest.raises(OSError) as raised:
        list(batches.micro_batches(plan))
    assert raised.value is error
    batches.close()
    assert threading.active_count() == threads


def test_a_prefetcher_makes_no_more_than_its_depth() -> None:
    made: list[int] = []

    def items() -> Any:
        for number in range(10):
            made.append(number)
            yield number

    prefetcher = Prefetcher(items(), depth=2)
    assert next(prefetcher) == 0
    prefetcher.close()
    assert made in ([0], [0, 1], [0, 1, 2])
    assert list(Prefetcher(iter("abc"))) == ["a", "b", "c"]


def test_batches_of_a_stage_are_made_after_its_ranking(tmp_path: Path) -> None:
    """A stage that the student ranks may get another order until its first step; nothing is made
    ahead of that. Its weights reach the batches.
    """
    batches = make(tmp_path, OffPolicy())
    plan = build_plan(np.arange(SAMPLES), num_subsets=2, epochs_per_stage=2, batch_size=4)
    sampler = Sampler(plan, 3)
    schedule = TrainingSchedule(plan, sampler, TrainConfig(), first_ranked_stage=1)
    batches.schedule, batches.data.micro_batch_size = schedule, 2
    first_stage = plan.stages[0].steps
    weights = np.linspace(0, 1, SAMPLES, dtype=np.float32)
    for step in range(plan.total_steps):
        position = sampler.position(step)
        end = first_stage if step < first_stage else plan.total_steps
        assert schedule.known_until(position) == end
        assert schedule.starts_ranked_stage(position) == (step == first_stage)
        if step == first_stage:
            # An order from hard to easy without sample 0, whose weight is 0.
            sampler.replace_stage(plan.with_order(1, np.arange(SAMPLES)[::-1], weights))
        selected = batches.select(position)
        assert sorted(selected.rows) == sorted(sampler.batch(step))
        for batch in batches.micro_batches(selected):
            if step < first_stage:
                assert batch.sample_weights is None
            else:
                assert 0 not in batch.rows and batch.sample_weights is not None
                expected_weights = weights[list(batch.rows)] / weights[1:].mean(dtype=np.float64)
                np.testing.assert_allclose(batch.sample_weights.numpy(), expected_weights)
        ahead = batches.plan_ahead(position)
        assert (ahead is not None) == (step + STEPS_AHEAD < end)
    batches.close()


def test_batches_of_cached_teachers_of_stages_wait_for_their_stage(tmp_path: Path) -> None:
    """Their outputs are read from the cache of their own stage's teacher."""
    batches = make(tmp_path, OffPolicy())
    plan = build_plan(np.arange(SAMPLES), num_subsets=3, epochs_per_stage=1, batch_size=4)
    sampler = Sampler(plan, 3)
    schedule = TrainingSchedule(plan, sampler, TrainConfig(), prepares_next_stage=False)
    batches.schedule, batches.data.micro_batch_size = schedule, 2
    begun: list[int] = []
    batches.data.teacher_reader = lambda dataset, batch: replace(batch, teacher_number=begun[-1])
    ends = np.cumsum([stage.steps for stage in plan.stages])
    for step in range(plan.total_steps):
        position = sampler.position(step)
        begun.append(position.stage)
        assert schedule.known_until(position) == ends[position.stage]
        selected = batches.select(position)
        numbers = [batch.teacher_number for batch in batches.micro_batches(selected)]
        assert numbers == [position.stage] * len(numbers)
        ahead = batches.plan_ahead(position)
        assert ahead is None or ahead.position.stage == position.stage
    batches.close()
