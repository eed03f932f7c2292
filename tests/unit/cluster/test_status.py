"""`pocl status`: notes, and the end of `--watch` when no job waits or runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pocl_ds.cli.main import main
from pocl_ds.cluster import scheduler
from pocl_ds.cluster.attempts import Attempt, write_attempt
from pocl_ds.cluster.profile import check_profile
from pocl_ds.cluster.scheduler import QueuedJob
from pocl_ds.cluster.submit import Submission
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import record_recipe


def submission(folder: Path) -> Submission:
    """A small run that is frozen and not submitted."""
    recipe = check_recipe(
        {
            "name": "x",
            "data": {"source": "documentation"},
            "teacher": {"model": "t"},
            "student": {"model": "s"},
            "launch": {"ranks": 1},
        }
    )
    profile = check_profile({"name": "here", "cpus_per_node": 8}, "here")
    submitted = Submission(RunDirectory(folder / "run"), recipe, profile, nodes=None)
    record_recipe(submitted.run, submitted.recipe)
    submitted._freeze()
    return submitted


@pytest.mark.parametrize(
    "end_state", ["TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "CANCELLED", "PREEMPTED", "FAILED"]
)
def test_watching_ends_with_the_jobs(
    end_state: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    submitted = submission(tmp_path)
    states = {"init-student": ["RUNNING", "RUNNING", end_state]}
    sleeps: list[float] = []
    for number, job in enumerate(submitted.jobs):
        (submitted.folder / "jobs" / f"{job.name}.ids").write_text(f"{number + 10}\n")

    def queue(ids: list[str]) -> list[QueuedJob]:
        rows = []
        for number, job in enumerate(submitted.jobs):
            state = states.get(job.name, ["CANCELLED" if len(sleeps) > 1 else "PENDING"])
            fields = {
                **dict.fromkeys(scheduler.FIELDS, ""),
                "id": str(number + 10),
                "array": str(number + 10),
                "task": "N/A",
                "state": state[min(len(sleeps), len(state) - 1)],
                "start": "N/A",
            }
            rows.append(QueuedJob(**fields))
        return rows

    monkeypatch.setattr(scheduler, "available", lambda: True)
    monkeypatch.setattr(scheduler, "queue", queue)

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        assert len(sleeps) < 9, "it would never end"

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["status", "--run-dir", str(tmp_path / "run"), "--watch"]) == 0
    assert len(sleeps) == 2 and capsys.readouterr().out.count("init-student") >= 3


@pytest.mark.parametrize("end", [None, 9.0])
def test_an_attempt_without_a_recorded_end_has_a_note(
    end: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    submitted = submission(tmp_path)
    fields = {
        **dict.fromkeys(scheduler.FIELDS, ""),
        "id": "10",
        "array": "10",
        "task": "N/A",
        "state": "FAILED",
        "start": "N/A",
    }
    (submitted.folder / "jobs" / "init-student.ids").write_text("10\n")
    write_attempt(
        submitted.folder / "attempts" / "init-student.jsonl", Attempt(1, "10", ["n1"], 5.0, end)
    )
    monkeypatch.setattr(scheduler, "available", lambda: True)
    monkeypatch.setattr(scheduler, "queue", lambda _: [QueuedJob(**fields)])
    assert main(["status", "--run-dir", str(tmp_path / "run")]) == 0
    note = "attempt 1 has no recorded end: its node may have failed, or the disk of"
    assert (note in capsys.readouterr().out) == (end is None)
