"""`pocl status --watch`: it ends when nothing of a run waits or runs any more, however that ended."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pocl_ds.cli.main import main
from pocl_ds.cluster import scheduler
from pocl_ds.cluster.attempts import Attempt, write_attempt
from pocl_ds.cluster.profile import check_profile
from pocl_ds.cluster.scheduler import Queued
from pocl_ds.cluster.submit import Submission
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import record_recipe


def submission(folder: Path) -> Submission:
    """Of a small run, whose jobs nobody has."""
    recipe = check_recipe(
        {"name": "x", "teacher": {"model": "t"}, "student": {"model": "s"}, "launch": {"ranks": 1}}
    )
    profile = check_profile({"name": "here", "cpus_per_node": 8}, "here")
    submitted = Submission(RunDirectory(folder / "run"), recipe, profile, nodes=None)
    record_recipe(submitted.run, submitted.recipe)
    submitted._freeze()
    return submitted


@pytest.mark.parametrize(
    "last", ["TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "CANCELLED", "PREEMPTED", "FAILED"]
)
def test_a_watch_ends_with_the_jobs(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted = submission(tmp_path)
    states = {"init-student": ["RUNNING", "RUNNING", last]}
    seen: list[str] = []
    for number, job in enumerate(submitted.jobs):
        (submitted.folder / "jobs" / f"{job.name}.ids").write_text(f"{number + 10}\n")

    def queue(ids: list[str]) -> list[Queued]:
        found = []
        for number, job in enumerate(submitted.jobs):
            state = states.get(job.name, ["CANCELLED" if len(seen) > 1 else "PENDING"])
            fields = {
                **dict.fromkeys(scheduler.FIELDS, ""),
                "id": str(number + 10),
                "array": str(number + 10),
                "task": "N/A",
                "state": state[min(len(seen), len(state) - 1)],
                "start": "N/A",
            }
            found.append(Queued(**fields))
        return found

    monkeypatch.setattr(scheduler, "available", lambda: True)
    monkeypatch.setattr(scheduler, "queue", queue)

    def sleep(_: float) -> None:
        seen.append("again")
        assert len(seen) < 9, "it would go on for ever"

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["status", str(tmp_path / "run"), "--watch"]) == 0
    assert len(seen) == 2 and capsys.readouterr().out.count("init-student") >= 3


@pytest.mark.parametrize("end", [None, 9.0])
def test_a_job_whose_last_attempt_could_not_be_noted(
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
    (submitted.folder / "jobs" / "prepare.ids").write_text("10\n")
    write_attempt(
        submitted.folder / "attempts" / "prepare.jsonl", Attempt(1, "10", ["n1"], 5.0, end)
    )
    monkeypatch.setattr(scheduler, "available", lambda: True)
    monkeypatch.setattr(scheduler, "queue", lambda _: [Queued(**fields)])
    assert main(["status", str(tmp_path / "run")]) == 0
    said = f"attempt 1 left no word of its end: its node may be gone, or the disk of {tmp_path / 'run'} full"
    assert (said in capsys.readouterr().out) == (end is None)
