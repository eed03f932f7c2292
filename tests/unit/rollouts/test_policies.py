"""Policies: who writes a step's responses follows from seed and step, the buffer keeps to the
stage, and all of it resumes.
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
from pocl_ds.curriculum.sampler import Position
from pocl_ds.data.generated import Written
from pocl_ds.rollouts.policies import POLICIES, Asked, Distillm, Gkd, Mixture, Off, draw

TOTAL, BATCH = 200, 4


class Split:
    """20 samples; sample r asks r and answers r."""

    name = "train"
    ids = np.array([f"s{row}".encode() for row in range(20)], "S4")
    prompt_tokens = np.full(20, 2, np.int64)
    total_tokens = np.full(20, 4, np.int64)
    loss_tokens = total_tokens - prompt_tokens

    def __len__(self) -> int:
        return 20

    def tokens(self, row: int) -> NDArray[np.uint32]:
        return np.array([5, row, 6, 0], np.uint32)


SPLIT = Split()


class Writer:
    """Answers with the step it was asked at; keeps count."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, rows: NDArray[np.int64], position: Position) -> Written:
        self.calls.append(position.step)
        return Written.of(
            SPLIT,
            rows,
            [[10 + position.step, 0]] * len(rows),
            eos_id=0,
            longest=9,
            allowed=np.ones(500, bool),
        )


def asked(step: int, rows: NDArray[np.int64] | None = None, stage: range = range(20)) -> Asked:
    chosen = (
        np.random.default_rng([7, step]).choice(list(stage), BATCH, replace=False)
        if rows is None
        else rows
    )
    return Asked(Position(step, 0, 0, step), TOTAL, SPLIT, chosen, lambda: np.array(stage))


def test_off_and_seqkd_change_nothing() -> None:
    for name in ("off", "seqkd"):
        policy = POLICIES[name](PolicyConfig(name=name), Writer(), 1)  # type: ignore[arg-type]
        question = asked(3)
        split, rows = policy.sequences(question)
        assert split is SPLIT and rows is question.rows and policy.state() == {}


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_gkd_writes_with_its_probability(lmbda: float) -> None:
    writer = Writer()
    policy = Gkd(PolicyConfig(name="gkd", lmbda=lmbda), writer, 5)
    found = [policy.sequences(asked(step)) for step in range(TOTAL)]
    assert len(writer.calls) == pytest.approx(
        lmbda * TOTAL, abs=0.1 * TOTAL if 0 < lmbda < 1 else 0
    )
    assert [step for step in range(TOTAL) if found[step][0] is not SPLIT] == writer.calls
    again = Writer()
    other = Gkd(PolicyConfig(name="gkd", lmbda=lmbda), again, 5)
    for step in range(100, TOTAL):  # from the middle: the same steps
        other.sequences(asked(step))
    assert again.calls == [step for step in writer.calls if step >= 100]


def test_a_mixture_takes_from_each_source_its_share() -> None:
    writer, taught = Writer(), copy.copy(SPLIT)
    policy = Mixture(
        PolicyConfig(name="mixture", shares=SharesConfig(data=0.5, student=0.3, teacher=0.2)),
        writer,
        5,
    )
    found = [policy.sequences(replace(asked(step), taught=taught)) for step in range(TOTAL)]
    counts = [sum(split is source for split, _ in found) for source in (SPLIT, taught)]
    assert counts[0] == pytest.approx(0.5 * TOTAL, abs=0.1 * TOTAL) and counts[1] == pytest.approx(
        0.2 * TOTAL, abs=0.1 * TOTAL
    )
    assert len(writer.calls) == TOTAL - sum(counts) and policy.state() == {}
    only = Mixture(
        PolicyConfig(name="mixture", shares=SharesConfig(data=0, teacher=1)), Writer(), 5
    )
    assert all(
        only.sequences(replace(asked(step), taught=taught))[0] is taught for step in range(TOTAL)
    )


def distillm(**options: Any) -> tuple[Distillm, Writer]:
    writer = Writer()
    return Distillm(PolicyConfig(name="distillm", **options), writer, 3), writer


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
        policy.validated(loss)
        assert policy.phi == pytest.approx(phi), loss
    assert policy.accepted == 9.0
    assert caplog.messages[1] == (
        "the validation loss rose from 2.1000 to 2.3000: from here on the student's responses "
        "have 80% "
        "of the steps"
    )


def test_without_phi_no_one_writes() -> None:
    policy, writer = distillm()
    assert (
        all(policy.sequences(asked(step))[0] is SPLIT for step in range(TOTAL))
        and writer.calls == []
    )


def test_the_buffer_fills_first_and_is_drawn_from_then() -> None:
    policy, writer = distillm(buffer=12)
    policy.phi = 1.0
    for step in range(3):
        policy.sequences(asked(step))
    assert writer.calls == [0, 1, 2] and policy.buffer is not None and len(policy.buffer) == 12
    fresh = 0
    for step in range(3, TOTAL):
        before = {
            row: text.tolist()
            for row, text in zip(policy.buffer.rows, policy.buffer.texts, strict=True)
        }
        found, rows = policy.sequences(asked(step))
        assert isinstance(found, Written) and len(rows) == BATCH and len(policy.buffer) == 12
        if writer.calls[-1] == step:
            fresh += 1
        else:
            assert all(found.texts[i].tolist()[:2] == [5, int(found.rows[i])] for i in rows)
            assert set(found.rows.tolist()) <= set(before)
    expected = sum(1 - step / TOTAL for step in range(3, TOTAL))
    assert fresh == pytest.approx(expected, abs=25)


@pytest.mark.parametrize("phi", [0.4, 0.8])
def test_of_all_steps_phi_are_the_students_and_phi_less_with_time_are_written_anew(
    phi: float,
) -> None:
    """METHOD 3: both probabilities are of a step, as in the authors' release, where one number is
    held against both.
    """
    policy, writer = distillm(buffer=BATCH)
    policy.phi = 1.0
    policy.sequences(asked(0))
    policy.phi, writer.calls = phi, []
    theirs = [step for step in range(TOTAL) if policy.sequences(asked(step))[0] is not SPLIT]
    assert len(theirs) == pytest.approx(phi * TOTAL, abs=0.1 * TOTAL)
    assert len(writer.calls) == pytest.approx(phi * TOTAL / 2, abs=0.06 * TOTAL)


def test_what_is_drawn_again_is_of_the_stage() -> None:
    policy, writer = distillm(buffer=8)
    policy.phi = 1.0
    policy.sequences(asked(0, stage=range(10)))
    policy.sequences(asked(1, stage=range(10)))
    found, _ = policy.sequences(
        asked(TOTAL - 1, stage=range(10, 20))
    )  # nothing kept is of that stage
    assert (
        isinstance(found, Written)
        and writer.calls[-1] == TOTAL - 1
        and set(found.rows) <= set(range(10, 20))
    )


@settings(max_examples=25, deadline=None)
@given(stop=st.integers(0, 60), phi=st.sampled_from([0.3, 1.0]), buffer=st.integers(1, 20))
def test_it_goes_on_as_if_it_had_never_stopped(stop: int, phi: float, buffer: int) -> None:
    def walk(policy: Distillm, steps: range) -> list[Any]:
        seen = []
        for step in steps:
            split, rows = policy.sequences(asked(step))
            seen.append([split.tokens(int(row)).tolist() for row in rows])
            if step % 10 == 9:
                policy.validated(2.0 + 0.02 * step)
        return seen

    whole, part = distillm(buffer=buffer)[0], distillm(buffer=buffer)[0]
    whole.phi = part.phi = phi
    expected = walk(whole, range(60))
    walk(part, range(stop))
    later = distillm(buffer=buffer)[0]
    later.restore(json.loads(json.dumps(part.state())))
    assert walk(later, range(stop, 60)) == expected[stop:]


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("stop", [0, 25])
def test_ranks_agree_and_a_stop_changes_nothing(name: str, stop: int) -> None:
    """What every policy promises, with `taught` responses at hand and losses that rise."""
    shares = SharesConfig(data=0.4, student=0.3, teacher=0.3)
    options = PolicyConfig(
        name=name, shares=shares, replay_buffer_size=8, phi_step=0.5, loss_tolerance=0
    )

    def walk(policy: Any, steps: range) -> list[Any]:
        seen = []
        for step in steps:
            split, rows = policy.sequences(replace(asked(step), taught=copy.copy(SPLIT)))
            assert len(rows) == BATCH
            seen.append([split.tokens(int(row)).tolist() for row in rows])
            if step % 10 == 9:
                policy.validated(2.0 + step)
        return seen

    made = [POLICIES[name](options, Writer(), 3) for _ in range(3)]
    expected = walk(made[0], range(50))
    assert walk(made[1], range(stop)) == expected[:stop]
    made[2].restore(json.loads(json.dumps(made[1].state())))
    assert walk(made[2], range(stop, 50)) == expected[stop:]


def test_a_response_is_cut_where_it_must_be() -> None:
    allowed = np.ones(50, bool)
    allowed[40] = False
    rows = np.array([3, 4, 5, 6])
    found = Written.of(
        SPLIT,
        rows,
        [[7, 8, 0], [7, 40, 8, 0], [40, 0], [9] * 20],
        eos_id=0,
        longest=6,
        allowed=allowed,
    )
    assert [text.tolist() for text in found.texts] == [
        [5, 3, 7, 8, 0],
        [5, 4, 7],
        [5, 5, 0],
        [5, 6, 9, 9, 9, 9],
    ]
    assert found.total_tokens.tolist() == [5, 3, 3, 6] and found.loss_tokens.tolist() == [
        3,
        1,
        1,
        4,
    ]
    assert found.ids.tolist() == [b"s3", b"s4", b"s5", b"s6"]


def test_draws_follow_from_seed_step_and_stream() -> None:
    assert draw(1, 2, 0) == draw(1, 2, 0)
    assert (
        len(
            {
                draw(seed, step, stream)
                for seed in range(3)
                for step in range(3)
                for stream in range(2)
            }
        )
        == 18
    )


def test_every_policy_of_the_recipe_is_there() -> None:
    assert set(POLICIES) == set(registry.POLICIES)
    assert isinstance(POLICIES["off"](PolicyConfig(), Writer(), 0), Off)
