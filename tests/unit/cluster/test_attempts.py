"""What becomes of a job after an attempt."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.cluster.attempts import (
    AGAIN,
    DONE,
    ENDED,
    FAILED,
    PREEMPTED,
    Attempt,
    excluded,
    judge,
    read_attempts,
    signature,
    write_attempt,
)
from pocl_ds.errors import HANG, RESUME, UNFIT


def attempt(number: int, **fields: Any) -> Attempt:
    return Attempt(number, "7", ["n1"], 0.0, **{"end": 1.0, **fields})


CRASH = {"code": 1, "error": "IndexError: at 0x7f00", "progress": 7}


def test_a_crash_is_tried_once_more_and_no_more() -> None:
    first, second = attempt(1, **CRASH), attempt(2, **{**CRASH, "error": "IndexError: at 0x7fab"})
    assert judge([], first, most=5).outcome == AGAIN
    verdict = judge([first], second, most=5)
    assert verdict.outcome == FAILED and "as in attempt 1" in verdict.why


def test_another_error_or_another_place_is_another_matter() -> None:
    first = attempt(1, **CRASH)
    assert judge([first], attempt(2, **{**CRASH, "progress": 9}), most=5).outcome == AGAIN
    assert judge([first], attempt(2, **{**CRASH, "error": "KeyError: 3"}), most=5).outcome == AGAIN


def test_what_only_the_user_can_mend_is_never_tried_again() -> None:
    verdict = judge([], attempt(1, code=2, error="train.lr is not a number"), most=5)
    assert verdict.outcome == FAILED and verdict.why == "train.lr is not a number"


def test_a_run_that_gets_further_is_never_given_up() -> None:
    before: list[Attempt] = []
    for number in range(1, 40):
        last = attempt(number, code=RESUME, stopped="SIGUSR2", progress=10 * number)
        assert judge(before, last, most=3).outcome == AGAIN
        before.append(last)


def test_attempts_without_progress_are_counted() -> None:
    before = [attempt(1, code=RESUME, stopped="SIGUSR2", progress=20)]
    for number, outcome in ((2, AGAIN), (3, FAILED)):
        last = attempt(number, code=RESUME, stopped="SIGUSR2", progress=20)
        assert judge(before, last, most=3).outcome == outcome
        before.append(last)


@pytest.mark.parametrize(
    "fields",
    [
        {"code": RESUME, "stopped": PREEMPTED},
        {
            "code": RESUME,
            "stopped": "SIGTERM",
            "outcome": ENDED,
        },  # without a grace time SLURM requeues at once
        {"end": None, "stopped": "SIGTERM"},  # and may kill it before it is through
    ],
)
def test_an_attempt_whose_nodes_slurm_took_is_not_counted(fields: dict[str, Any]) -> None:
    """A scoring task has no steps to show: three preemptions in a row used to end it, and the run."""
    taken = [attempt(number, **fields) for number in range(1, 30)]
    assert judge(taken, attempt(30, code=RESUME, stopped=PREEMPTED), most=3).outcome == AGAIN
    slow = [attempt(number, code=RESUME, stopped="SIGUSR2") for number in (30, 31, 32)]
    assert [judge([*taken, *slow[:n]], slow[n], most=3).outcome for n in range(3)] == [
        AGAIN,
        AGAIN,
        FAILED,
    ]
    assert judge([*slow[:2], *taken], slow[2], most=3).outcome == FAILED, (
        "nor does it forgive the others"
    )


def test_what_slurm_ends_is_left_to_slurm() -> None:
    asked = attempt(1, code=RESUME, stopped="SIGTERM")
    verdict = judge([asked] * 5, asked, most=3, taken=True)
    assert (
        verdict.outcome == ENDED
        and verdict.why == "stopped by SIGTERM; SLURM itself ends or requeues the job"
    )
    assert judge([], attempt(1, code=0), most=3, taken=True).outcome == DONE
    assert judge([], attempt(1, code=2, error="no"), most=3, taken=True).outcome == FAILED


def test_a_lost_attempt_is_no_crash_but_counts() -> None:
    lost = attempt(1, end=None, progress=20)
    assert judge([lost], attempt(2, **{**CRASH, "progress": 20}), most=5).outcome == AGAIN
    assert (
        judge([lost] * 4, attempt(5, code=RESUME, stopped="SIGTERM", progress=20), most=5).outcome
        == FAILED
    )


@given(
    st.lists(
        st.tuples(st.sampled_from([1, RESUME, HANG, UNFIT, 137]), st.integers(0, 3)),
        min_size=1,
        max_size=30,
    )
)
def test_every_job_comes_to_an_end(codes: list[tuple[int, int]]) -> None:
    """Without progress beyond a bound, no sequence of codes goes on for ever."""
    before: list[Attempt] = []
    for number, (code, progress) in enumerate(codes, 1):
        last = attempt(number, code=code, progress=min(progress, 3), error=f"error {code}")
        if judge(before, last, most=4).outcome != AGAIN:
            return
        before.append(last)
    assert len(before) < 16 or any(a.progress < b.progress for a, b in pairwise(before))


def test_success_is_success() -> None:
    assert judge([attempt(1, **CRASH)], attempt(2, code=0), most=1).outcome == DONE


def test_nodes_that_a_job_keeps_away_from() -> None:
    lost = Attempt(1, "7", ["n4"], 0.0)
    assert excluded([lost]) == []
    assert excluded([lost, Attempt(2, "7", ["n4"], 0.0)]) == ["n4"]
    assert excluded([attempt(1, code=UNFIT, suspects=["n9"])]) == ["n9"]
    both = Attempt(1, "7", ["n1", "n2"], 0.0)
    assert excluded([both, both]) == [], "which of the two it was, nobody knows"


def test_signatures_forget_addresses_times_and_ports() -> None:
    assert signature("at 0x7f1 on host:29500 12:30:59 pid 77") == signature(
        "at 0xabc on host:31000 08:00:00 pid 8"
    )
    assert signature("step 12") != signature("step 13")
    assert signature("ran for 120041 milliseconds") == signature(
        "ran for 120007 milliseconds"
    )  # as c10d words a hang


def test_the_newest_line_of_a_number_counts_and_torn_ones_do_not(tmp_path: Path) -> None:
    path = tmp_path / "a" / "train.jsonl"
    write_attempt(path, attempt(1, end=None))
    write_attempt(path, attempt(1, code=75))
    write_attempt(path, attempt(2))
    with path.open("a") as stream:
        stream.write('{"number": 3, "jo')
    assert [(a.number, a.code) for a in read_attempts(path)] == [(1, 75), (2, None)]
    write_attempt(path, attempt(4))
    assert [a.number for a in read_attempts(path)] == [1, 2, 4]
    assert read_attempts(tmp_path / "none") == []


def test_a_node_whose_job_was_asked_to_leave_and_then_killed_is_not_left_out() -> None:
    """A preemption may end a job before it has saved: twice on one node says nothing against that
    node.
    """
    lost = [attempt(number, end=None, stopped="SIGTERM") for number in (1, 2, 3)]
    assert excluded(lost) == []
    assert excluded([*lost, attempt(4, end=None), attempt(5, end=None)]) == ["n1"]
