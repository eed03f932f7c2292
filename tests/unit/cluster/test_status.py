"""`pocl status`: progress of a job array, states, and GPU hours."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.cluster.attempts import FAILED, Attempt, write_attempt
from pocl_ds.cluster.scheduler import QueuedJob
from pocl_ds.cluster.status import _progress, _row, state_of_run
from pocl_ds.workflow.run_dir import RunDirectory


def test_a_shard_of_the_cache_is_finished_when_that_of_each_teacher_is(tmp_path: Path) -> None:
    run, spec = RunDirectory(tmp_path), {"array": [0, 1]}
    assert _progress(run, "cache-teacher", spec, {}) == "0/2 shards"
    first, second = (run.teacher_cache / name for name in ("a", "b"))
    for folder in (first, second):
        folder.mkdir(parents=True)
    (run.teacher_cache / "manifest.json").touch()
    for folder, number, expected in ((first, 0, 0), (first, 1, 0), (second, 1, 1), (second, 0, 2)):
        (folder / f"train-{number:05d}-of-00002.manifest.json").touch()
        assert _progress(run, "cache-teacher", spec, {}) == f"{expected}/2 shards"


def spec_and_run(tmp_path: Path, *attempts: Attempt) -> tuple[dict[str, Any], RunDirectory]:
    run = RunDirectory(tmp_path)
    (run.cluster / "jobs").mkdir(parents=True)
    (run.cluster / "jobs" / "train.ids").write_text("12\n")
    for attempt in attempts:
        write_attempt(run.cluster / "attempts" / "train.jsonl", attempt)
    spec: dict[str, Any] = {
        "name": "train",
        "steps": ["train"],
        "array": [],
        "after": [],
        "nodes": 2,
        "gpus_per_node": 4,
    }
    return spec, run


def queued(state: str, reason: str = "None") -> QueuedJob:
    since = "2026-11-30T10:00:00"
    return QueuedJob(
        "12", "12", "N/A", "x:train", state, reason, "N/A", "1:00", "2:00", "n1", since
    )


LOST = Attempt(
    1,
    "12",
    ["n1", "n2"],
    start=1000.0,
    end=1000.0 + 1800,
    code=1,
    error="rank-1 on n2 ended without a record",
    outcome=FAILED,
    reason="rank-1 on n2 ended without a record (exit code 1): SLURM lost n2 (DOWN*)",
)


@pytest.mark.parametrize(
    ("state", "reason", "word"), [("PENDING", "BeginTime", "pending"), ("RUNNING", "", "running")]
)
def test_a_live_job_outranks_an_old_failure(
    tmp_path: Path, state: str, reason: str, word: str
) -> None:
    """SLURM requeues a job that lost a node after its attempt has failed."""
    spec, run = spec_and_run(tmp_path, LOST)
    row = _row(run, spec, {"train": False}, [queued(state, reason)], [])
    assert row.state.startswith(word) and row.live
    assert row.notes[-1] == f"attempt 1: {LOST.reason}"
    assert state_of_run([row]) == "live"
    # Without the job it has failed.
    row = _row(run, spec, {"train": False}, [queued("FAILED")], [])
    assert row.state == "failed" and state_of_run([row]) == "failed"
    assert state_of_run([_row(run, spec, {"train": True}, [], [])]) == "done"


def test_gpu_hours_are_those_of_all_attempts(tmp_path: Path) -> None:
    killed = Attempt(2, "12", ["n1", "n2"], start=5000.0)  # no recorded end
    last = Attempt(3, "12", ["n1", "n2"], start=9000.0, end=9000.0 + 900, code=75)
    spec, run = spec_and_run(tmp_path, LOST, killed, last)
    row = _row(run, spec, {"train": False}, [], [])
    assert row.gpu_hours == pytest.approx(8 * (1800 + 900) / 3600)
    row = _row(run, {**spec, "gpus_per_node": 0}, {"train": False}, [], [])
    assert row.gpu_hours is None


def test_a_running_attempt_counts_until_now(tmp_path: Path) -> None:
    running = Attempt(1, "12", ["n1", "n2"], start=time.time() - 3600)
    spec, run = spec_and_run(tmp_path, running)
    row = _row(run, spec, {"train": False}, [queued("RUNNING")], [])
    assert row.gpu_hours == pytest.approx(8, rel=0.01)
