"""Policies: the source of a step's responses follows from seed and step, replay stays in the stage,
and a resumed policy continues as if it had never stopped.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pocl_ds.config import PolicyConfig, SharesConfig, registry
from pocl_ds.curriculum.sampler import SamplerPosition
from pocl_ds.data.generated import GeneratedBatch
from pocl_ds.rollouts.policies import (
    GKD,
    POLICIES,
    BatchRequest,
    DistiLLM,
    OffPolicy,
    ResponseMixture,
    uniform_draw,
)

TOTAL, BATCH = 200, 4


class Split:
    """20 samples of two prompt and two response tokens; the second one is the row."""

    name = "train"
    ids = np.array([f"s{row}".encode() for row in range(20)], "S4")
    prompt_tokens = np.full(20, 2, np.int64)
    total_tokens = np.full(20, 4, np.int64)
    loss_tokens = total_tokens - prompt_tokens

    def __len__(self) -> int:
        return 20

    def tokens(self, row: int) -> NDArray[np.uint32]:
        return np.array([5, row, 6, 0], np.uint32)

    def loss_mask(self, row: int) -> NDArray[np.bool_]:
        return np.arange(int(self.total_tokens[row])) >= int(self.prompt_tokens[row])

    def prompt_source(self, row: int) -> tuple[str, int]:
        return self.name, row


SPLIT = Split()


class FakeGenerator:
    """Responds with the number of the step, and records the steps."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, rows: NDArray[np.int64], position: SamplerPosition) -> GeneratedBatch:
        self.calls.append(position.step)
        return GeneratedBatch.from_responses(
            SPLIT,
            rows,
            [[10 + position.step, 0]] * len(rows),
            end_of_turn_id=0,
            max_length=9,
            allowed=np.ones(500, bool),
        )


def request(
    step: int, rows: NDArray[np.int64] | None = None, stage: range = range(20)
) -> BatchRequest:
    chosen = (
        np.random.default_rng([7, step]).choice(list(stage), BATCH, replace=False)
        if rows is None
        else rows
    )
    return BatchRequest(
        SamplerPosition(step, 0, 0, step), TOTAL, SPLIT, chosen, lambda: np.array(stage)
    )


def test_off_and_seqkd_train_on_the_dataset() -> None:
    for name in ("off", "seqkd"):
        policy = POLICIES[name](PolicyConfig(name=name), FakeGenerator(), 1)
        batch_request = request(3)
        split, rows = policy.select_batch(batch_request)
        assert split is SPLIT and rows is batch_request.rows and policy.state_dict() == {}


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_gkd_generates_with_its_probability(lmbda: float) -> None:
    generator = FakeGenerator()
    policy = GKD(PolicyConfig(name="gkd", lmbda=lmbda), generator, 5)
    batches = [policy.select_batch(request(step)) for step in range(TOTAL)]
    assert len(generator.calls) == pytest.approx(
        lmbda * TOTAL, abs=0.1 * TOTAL if 0 < lmbda < 1 else 0
    )
    assert [step for step in range(TOTAL) if batches[step][0] is not SPLIT] == generator.calls
    resumed_generator = FakeGenerator()
    resumed = GKD(PolicyConfig(name="gkd", lmbda=lmbda), resumed_generator, 5)
    for step in range(100, TOTAL):  # from the middle: the same steps
        resumed.select_batch(request(step))
    assert resumed_generator.calls == [step for step in generator.calls if step >= 100]


def test_a_mixture_uses_each_source_by_its_share() -> None:
    generator, teacher_responses = FakeGenerator(), copy.copy(SPLIT)
    policy = ResponseMixture(
        PolicyConfig(name="mixture", shares=SharesConfig(data=0.5, student=0.3, teacher=0.2)),
        generator,
        5,
    )
    batches = [
        policy.select_batch(replace(request(step), teacher_responses=teacher_responses))
        for step in range(TOTAL)
    ]
    counts = [sum(split is source for split, _ in batches) for source in (SPLIT, teacher_responses)]
    assert counts[0] == pytest.approx(0.5 * TOTAL, abs=0.1 * TOTAL) and counts[1] == pytest.approx(
        0.2 * TOTAL, abs=0.1 * TOTAL
    )
    assert len(generator.calls) == TOTAL - sum(counts) and policy.state_dict() == {}
    teacher_only = ResponseMixture(
        PolicyConfig(name="mixture", shares=SharesConfig(data=0, teacher=1)), FakeGenerator(), 5
    )
    assert all(
        teacher_only.select_batch(replace(request(step), teacher_responses=teacher_responses))[0]
        is teacher_responses
        for step in range(TOTAL)
    )


def distillm(**options: Any) -> tuple[DistiLLM, FakeGenerator]:
    generator = FakeGenerator()
    return DistiLLM(PolicyConfig(name="distillm", **options), generator, 3), generator


def test_phi_grows_when_the_validation_loss_has_risen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pocl_ds")
    policy, _ = distillm(phi_step=0.4)
    for loss, phi in (
        (2.0, 0.0),
        (1.5, 0.0),
        (2.05, 0.0),
        (2.1, 0.4),
        (2.1, 0.4),
        (2.15, 0.4),
        (2.3, 0.8),
        (9.0, 1.0),
    ):
        policy.observe_validation_loss(loss)
        assert policy.phi == pytest.approx(phi), loss
    assert policy.reference_loss == 9.0
    assert caplog.messages[1] == (
        "the validation loss rose from 2.1000 to 2.3000: from now on 80% of the steps "
        "train on the student's responses"
    )


def test_with_phi_0_nothing_is_generated() -> None:
    policy, generator = distillm()
    assert (
        all(policy.select_batch(request(step))[0] is SPLIT for step in range(TOTAL))
        and generator.calls == []
    )


def test_a_full_buffer_is_replayed() -> None:
    policy, generator = distillm(replay_buffer_size=12)
    policy.phi = 1.0
    for step in range(3):
        policy.select_batch(request(step))
    assert generator.calls == [0, 1, 2] and policy.buffer is not None and len(policy.buffer) == 12
    generated_batches = 0
    for step in range(3, TOTAL):
        rows_before = {
            row: text.tolist()
            for row, text in zip(policy.buffer.rows, policy.buffer.sequences, strict=True)
        }
        batch, rows = policy.select_batch(request(step))
        assert isinstance(batch, GeneratedBatch) and len(rows) == BATCH and len(policy.buffer) == 12
        if generator.calls[-1] == step:
            generated_batches += 1
        else:
            assert all(batch.sequences[i].tolist()[:2] == [5, int(batch.rows[i])] for i in rows)
            assert set(batch.rows.tolist()) <= set(rows_before)
    expected = sum(1 - step / TOTAL for step in range(3, TOTAL))
    assert generated_batches == pytest.approx(expected, abs=25)


@pytest.mark.parametrize("phi", [0.4, 0.8])
def test_the_shares_of_student_steps_and_of_new_responses(
    phi: float,
) -> None:
    """docs/method.md, eq. 25: both probabilities are per step, and one random number decides both,
    as in the authors' release.
    """
    policy, generator = distillm(replay_buffer_size=BATCH)
    policy.phi = 1.0
    policy.select_batch(request(0))
    policy.phi, generator.calls = phi, []
    student_steps = [
        step for step in range(TOTAL) if policy.select_batch(request(step))[0] is not SPLIT
    ]
    assert len(student_steps) == pytest.approx(phi * TOTAL, abs=0.1 * TOTAL)
    assert len(generator.calls) == pytest.approx(phi * TOTAL / 2, abs=0.06 * TOTAL)


def test_replayed_responses_belong_to_the_stage() -> None:
    policy, generator = distillm(replay_buffer_size=8)
    policy.phi = 1.0
    policy.select_batch(request(0, stage=range(10)))
    policy.select_batch(request(1, stage=range(10)))
    batch, _ = policy.select_batch(
        request(TOTAL - 1, stage=range(10, 20))
    )  # the buffer holds nothing of that stage
    assert (
        isinstance(batch, GeneratedBatch)
        and generator.calls[-1] == TOTAL - 1
        and set(batch.rows) <= set(range(10, 20))
    )


@settings(max_examples=25, deadline=None)
@given(stop=st.integers(0, 60), phi=st.sampled_from([0.3, 1.0]), buffer=st.integers(1, 20))
def test_a_resumed_distillm_continues_as_if_never_stopped(
    stop: int, phi: float, buffer: int
) -> None:
    def select_batches(policy: DistiLLM, steps: range) -> list[Any]:
        batches = []
        for step in steps:
            split, rows = policy.select_batch(request(step))
            batches.append([split.tokens(int(row)).tolist() for row in rows])
            if step % 10 == 9:
                policy.observe_validation_loss(2.0 + 0.02 * step)
        return batches

    uninterrupted, stopped = (
        distillm(replay_buffer_size=buffer)[0],
        distillm(replay_buffer_size=buffer)[0],
    )
    uninterrupted.phi = stopped.phi = phi
    expected = select_batches(uninterrupted, range(60))
    select_batches(stopped, range(stop))
    resumed = distillm(replay_buffer_size=buffer)[0]
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert select_batches(resumed, range(stop, 60)) == expected[stop:]


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("stop", [0, 25])
def test_ranks_agree_and_a_resume_changes_nothing(name: str, stop: int) -> None:
    """For every policy, with teacher responses and rising losses."""
    shares = SharesConfig(data=0.4, student=0.3, teacher=0.3)
    options = PolicyConfig(
        name=name, shares=shares, replay_buffer_size=8, phi_step=0.5, loss_tolerance=0
    )

    def select_batches(policy: Any, steps: range) -> list[Any]:
        batches = []
        for step in steps:
            split, rows = policy.select_batch(
                replace(request(step), teacher_responses=copy.copy(SPLIT))
            )
            assert len(rows) == BATCH
            batches.append([split.tokens(int(row)).tolist() for row in rows])
            if step % 10 == 9:
                policy.observe_validation_loss(2.0 + step)
        return batches

    ranks = [POLICIES[name](options, FakeGenerator(), 3) for _ in range(3)]
    expected = select_batches(ranks[0], range(50))
    assert select_batches(ranks[1], range(stop)) == expected[:stop]
    ranks[2].load_state_dict(json.loads(json.dumps(ranks[1].state_dict())))
    assert select_batches(ranks[2], range(stop, 50)) == expected[stop:]


@pytest.mark.parametrize("name", list(POLICIES))
def test_expected_responses_are_used(name: str) -> None:
    """Also if the validation loss rises in between. Only such a rise needs responses that were not
    expected.
    """
    shares = SharesConfig(data=0.4, student=0.3, teacher=0.3)
    config = PolicyConfig(
        name=name, shares=shares, replay_buffer_size=8, phi_step=0.1, loss_tolerance=0
    )
    generator = FakeGenerator()
    policy: Any = POLICIES[name](config, generator, 3)
    expected, unexpected_after_validation = set(), set()
    for step in range(100):
        policy.select_batch(request(step))
        if policy.will_generate(request(step + 1)):
            expected.add(step + 1)
        if step % 5 == 4:
            policy.observe_validation_loss(2.0 + step)
            unexpected_after_validation.add(step + 1)
    expected -= {100}
    assert expected <= set(generator.calls)
    assert set(generator.calls) - expected <= {0} | unexpected_after_validation
    assert bool(expected) == registry.POLICIES[name]


def test_a_response_is_cut_at_the_limit_and_at_a_disallowed_id() -> None:
    allowed = np.ones(50, bool)
    allowed[40] = False
    rows = np.array([3, 4, 5, 6])
    batch = GeneratedBatch.from_responses(
        SPLIT,
        rows,
        [[7, 8, 0], [7, 40, 8, 0], [40, 0], [9] * 20],
        end_of_turn_id=0,
        max_length=6,
        allowed=allowed,
    )
    assert [sequence.tolist() for sequence in batch.sequences] == [
        [5, 3, 7, 8, 0],
        [5, 4, 7],
        [5, 5, 0],
        [5, 6, 9, 9, 9, 9],
    ]
    assert batch.total_tokens.tolist() == [5, 3, 3, 6] and batch.loss_tokens.tolist() == [
        3,
        1,
        1,
        4,
    ]
    assert batch.ids.tolist() == [b"s3", b"s4", b"s5", b"s6"]


def test_a_draw_depends_on_seed_step_and_stream() -> None:
    assert uniform_draw(1, 2, 0) == uniform_draw(1, 2, 0)
    assert (
        len(
            {
                uniform_draw(seed, step, stream)
                for seed in range(3)
                for step in range(3)
                for stream in range(2)
            }
        )
        == 18
    )


def test_every_policy_of_the_registry_exists() -> None:
    assert set(POLICIES) == set(registry.POLICIES)
    assert isinstance(POLICIES["off"](PolicyConfig(), FakeGenerator(), 0), OffPolicy)
