"""SLURM's commands: their output as values, their errors as sentences."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pocl_ds.cluster import machine_checks, scheduler
from pocl_ds.cluster.scheduler import SEPARATOR, QueuedJob
from pocl_ds.errors import ResourceError


def queued_job(**fields: str) -> QueuedJob:
    return QueuedJob(**{**dict.fromkeys(scheduler.FIELDS, ""), **fields})


@pytest.mark.parametrize(
    ("task", "tasks"), [("N/A", []), ("3", [3]), ("4-6", [4, 5, 6]), ("1,4-5%2", [1, 4, 5])]
)
def test_tasks_of_an_array(task: str, tasks: list[int]) -> None:
    assert queued_job(task=task).tasks == tasks


def write_program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_squeue_is_read_and_its_error_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fields = [
        "12_3",
        "12",
        "3",
        "a | b:train",
        "PENDING",
        "Resources",
        "N/A",
        "0:00",
        "1:00",
        "",
        "2026-01-01T00:00:00",
    ]
    line = SEPARATOR.join(fields)
    (tmp_path / "output").write_text(line + "\n")
    write_program(tmp_path, "squeue", f"cat {tmp_path}/output")
    jobs = scheduler.queue(["12"])
    assert [(job.id, job.name, job.state, job.tasks) for job in jobs] == [
        ("12_3", "a | b:train", "PENDING", [3])
    ]
    assert scheduler.live_jobs(["12"]) == jobs
    write_program(
        tmp_path, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    )
    assert scheduler.queue(["12"]) == []
    write_program(tmp_path, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ResourceError, match="squeue failed .Unable to contact"):
        scheduler.queue(["12"])


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="sbatch was not found.*pocl run"):
        scheduler.submit("x", [])
    assert machine_checks.check_scheduler().state == machine_checks.WARN
    assert scheduler.final_states(["1"]) == {}


def test_final_states_come_from_the_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accounting that does not answer counts as missing."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    write_program(tmp_path, "sacct", "echo '7|CANCELLED by 0'; echo '8_1|COMPLETED'; echo 'odd'")
    assert (
        scheduler.final_states(["7", "8_1"]) == {"7": "CANCELLED", "8_1": "COMPLETED"}
        and scheduler.final_states([]) == {}
    )
    write_program(tmp_path, "sacct", "echo '7|FAILED'; exit 1")
    assert scheduler.final_states(["7"]) == {}
    write_program(tmp_path, "sacct", "sleep 5")
    monkeypatch.setattr(scheduler, "TIMEOUT_SECONDS", 0.2)
    assert scheduler.final_states(["7"]) == {}
