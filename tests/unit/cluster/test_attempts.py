"""The decision after an attempt of a job."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.cluster.attempts import (
    DONE,
    ENDED,
    FAILED,
    PREEMPTED,
    RETRY,
    Attempt,
    decide,
    error_signature,
    excluded_nodes,
    read_attempts,
    write_attempt,
)
from pocl_ds.errors import EXIT_HANG, EXIT_RESUME, EXIT_UNFIT_NODE


def attempt(number: int, **fields: Any) -> Attempt:
    return Attempt(number, "7", ["n1"], 0.0, **{"end": 1.0, **fields})


CRASH = {"code": 1, "error": "IndexError: at 0x7f00", "progress": 7}


def test_a_crash_is_retried_once() -> None:
    crash = attempt(1, **CRASH)
    repeated_crash = attempt(2, **{**CRASH, "error": "IndexError: at 0x7fab"})
    assert decide([], crash, max_attempts=5).outcome == RETRY
    decision = decide([crash], repeated_crash, max_attempts=5)
    assert decision.outcome == FAILED and "as in attempt 1" in decision.reason


def test_another_error_or_another_place_is_retried() -> None:
    crash = attempt(1, **CRASH)
    assert decide([crash], attempt(2, **{**CRASH, "progress": 9}), max_attempts=5).outcome == RETRY
    assert (
        decide([crash], attempt(2, **{**CRASH, "error": "KeyError: 3"}), max_attempts=5).outcome
        == RETRY
    )


def test_an_error_of_the_user_is_never_retried() -> None:
    decision = decide([], attempt(1, code=2, error="train.lr is not a number"), max_attempts=5)
    assert decision.outcome == FAILED and decision.reason == "train.lr is not a number"


def test_a_job_that_makes_progress_is_always_retried() -> None:
    previous: list[Attempt] = []
    for number in range(1, 40):
        latest = attempt(number, code=EXIT_RESUME, stop_reason="SIGUSR2", progress=10 * number)
        assert decide(previous, latest, max_attempts=3).outcome == RETRY
        previous.append(latest)


def test_attempts_without_progress_are_limited() -> None:
    previous = [attempt(1, code=EXIT_RESUME, stop_reason="SIGUSR2", progress=20)]
    for number, outcome in ((2, RETRY), (3, FAILED)):
        latest = attempt(number, code=EXIT_RESUME, stop_reason="SIGUSR2", progress=20)
        assert decide(previous, latest, max_attempts=3).outcome == outcome
        previous.append(latest)


@pytest.mark.parametrize(
    "fields",
    [
        {"code": EXIT_RESUME, "stop_reason": PREEMPTED},
        {
            "code": EXIT_RESUME,
            "stop_reason": "SIGTERM",
            "outcome": ENDED,
        },  # without a grace time SLURM requeues at once
        {"end": None, "stop_reason": "SIGTERM"},  # SLURM may kill it before it has saved
    ],
)
def test_an_attempt_whose_nodes_slurm_took_does_not_count(fields: dict[str, Any]) -> None:
    """A scoring task records no optimizer steps, so preemptions must not count against it."""
    preempted = [attempt(number, **fields) for number in range(1, 30)]
    assert (
        decide(
            preempted, attempt(30, code=EXIT_RESUME, stop_reason=PREEMPTED), max_attempts=3
        ).outcome
        == RETRY
    )
    slow = [attempt(number, code=EXIT_RESUME, stop_reason="SIGUSR2") for number in (30, 31, 32)]
    assert [decide([*preempted, *slow[:n]], slow[n], max_attempts=3).outcome for n in range(3)] == [
        RETRY,
        RETRY,
        FAILED,
    ]
    assert decide([*slow[:2], *preempted], slow[2], max_attempts=3).outcome == FAILED, (
        "preemptions do not reset the count"
    )


def test_a_job_that_slurm_ends_is_not_requeued() -> None:
    stopped = attempt(1, code=EXIT_RESUME, stop_reason="SIGTERM")
    decision = decide([stopped] * 5, stopped, max_attempts=3, ended_by_slurm=True)
    assert (
        decision.outcome == ENDED
        and decision.reason == "stopped by SIGTERM; SLURM itself ends or requeues the job"
    )
    assert decide([], attempt(1, code=0), max_attempts=3, ended_by_slurm=True).outcome == DONE
    assert (
        decide([], attempt(1, code=2, error="no"), max_attempts=3, ended_by_slurm=True).outcome
        == FAILED
    )


def test_a_lost_attempt_counts_but_is_no_crash() -> None:
    lost = attempt(1, end=None, progress=20)
    assert decide([lost], attempt(2, **{**CRASH, "progress": 20}), max_attempts=5).outcome == RETRY
    assert (
        decide(
            [lost] * 4,
            attempt(5, code=EXIT_RESUME, stop_reason="SIGTERM", progress=20),
            max_attempts=5,
        ).outcome
        == FAILED
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, EXIT_RESUME, EXIT_HANG, EXIT_UNFIT_NODE, 137]), st.integers(0, 3)
        ),
        min_size=1,
        max_size=30,
    )
)
def test_every_job_without_progress_ends(codes: list[tuple[int, int]]) -> None:
    """With bounded progress, every sequence of exit codes ends."""
    previous: list[Attempt] = []
    for number, (code, progress) in enumerate(codes, 1):
        latest = attempt(number, code=code, progress=min(progress, 3), error=f"error {code}")
        if decide(previous, latest, max_attempts=4).outcome != RETRY:
            return
        previous.append(latest)
    assert len(previous) < 16 or any(a.progress < b.progress for a, b in pairwise(previous))


def test_exit_code_0_is_done() -> None:
    assert decide([attempt(1, **CRASH)], attempt(2, code=0), max_attempts=1).outcome == DONE


def test_excluded_nodes() -> None:
    lost = Attempt(1, "7", ["n4"], 0.0)
    assert excluded_nodes([lost]) == []
    assert excluded_nodes([lost, Attempt(2, "7", ["n4"], 0.0)]) == ["n4"]
    assert excluded_nodes([attempt(1, code=EXIT_UNFIT_NODE, unfit_nodes=["n9"])]) == ["n9"]
    pair = Attempt(1, "7", ["n1", "n2"], 0.0)
    assert excluded_nodes([pair, pair]) == [], "either node may be at fault"


def test_error_signatures_ignore_addresses_times_and_ports() -> None:
    assert error_signature("at 0x7f1 on host:29500 12:30:59 pid 77") == error_signature(
        "at 0xabc on host:31000 08:00:00 pid 8"
    )
    assert error_signature("step 12") != error_signature("step 13")
    assert error_signature("ran for 120041 milliseconds") == error_signature(
        "ran for 120007 milliseconds"
    )  # how c10d reports a hang


def test_the_newest_line_counts_and_damaged_lines_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a" / "train.jsonl"
    write_attempt(path, attempt(1, end=None))
    write_attempt(path, attempt(1, code=75))
    write_attempt(path, attempt(2))
    with path.open("a") as stream:
        stream.write('{"number": 3, "jo')
    assert [(a.number, a.code) for a in read_attempts(path)] == [(1, 75), (2, None)]
    write_attempt(path, attempt(4))
    assert [a.number for a in read_attempts(path)] == [1, 2, 4]
    with path.open("ab") as stream:
        stream.write(b"\xff\xfe\n")  # a damaged disk
    assert [a.number for a in read_attempts(path)] == [1, 2, 4]
    assert read_attempts(tmp_path / "none") == []


def test_a_node_whose_job_was_stopped_and_then_killed_is_not_excluded() -> None:
    """A preemption may end a job before it has saved; the node is not at fault."""
    lost = [attempt(number, end=None, stop_reason="SIGTERM") for number in (1, 2, 3)]
    assert excluded_nodes(lost) == []
    assert excluded_nodes([*lost, attempt(4, end=None), attempt(5, end=None)]) == ["n1"]
