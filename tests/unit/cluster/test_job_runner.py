"""The job runner: which rank and node it blames for a failed command."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.cluster.attempts import read_attempts
from pocl_ds.cluster.job_runner import Job
from pocl_ds.errors import EXIT_HANG, EXIT_UNFIT_NODE
from pocl_ds.runtime.process_exit import read_exit_records

PREFLIGHT = ["--module", "pocl_ds.cluster.preflight"]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job on three nodes, with fake SLURM commands."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(
        "#!/bin/sh\n[ \"$2\" != hostnames ] || printf 'n1\\nn2\\nn3\\n'\n"
    )
    body = (
        'mkdir -p "$POCL_EXITS"; cp "$RECORDS"/*.json "$POCL_EXITS"; exit "$(cat "$RECORDS"/code)"'
    )
    (programs / "srun").write_text(f"#!/bin/sh\n{body}\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("RECORDS", str(tmp_path / "records"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    spec = {
        "name": "train",
        "nodes": 3,
        "cpus_per_task": 1,
        "container": None,
        "python": "python3",
        "gpus_per_node": 0,
        "max_attempts": 3,
    }
    (tmp_path / "run" / "cluster" / "jobs").mkdir(parents=True)
    (tmp_path / "run" / "cluster" / "jobs" / "train.json").write_text(json.dumps(spec))
    return Job(tmp_path / "run", "train")


def run_preflight(job: Job, code: int, ranks: dict[int, tuple[int, str]]) -> int:
    """The exit code of a preflight whose srun ended with `code`. ranks: exit code and sentence of
    each rank that left a record.
    """
    records = job.run.parent / "records"
    records.mkdir()
    (records / "code").write_text(str(code))
    for rank, (rank_code, error) in ranks.items():
        record: dict[str, Any] = {
            "code": rank_code,
            "error": error,
            "time": rank,
            "node": f"n{rank + 1}",
        }
        (records / f"rank-{rank}.{rank_code}.json").write_text(json.dumps(record))
    return job._run_command(0, PREFLIGHT, ["train"], 1)


@pytest.mark.parametrize("code", [EXIT_UNFIT_NODE, 2])
def test_a_rank_that_srun_killed_is_not_blamed(job: Job, code: int) -> None:
    """Once a rank fails, srun kills the others: a fit node may then have no record."""
    assert (
        run_preflight(
            job, code, {0: (code, "preflight: n1: 7 of 8 promised GPUs are visible"), 1: (0, "")}
        )
        == code
    )
    assert job.attempt.error == "preflight: n1: 7 of 8 promised GPUs are visible"
    assert job.attempt.unfit_nodes == (["n1"] if code == EXIT_UNFIT_NODE else [])


def test_a_node_whose_ranks_never_answered_is_excluded(job: Job) -> None:
    waited = (EXIT_HANG, "preflight: the ranks do not reach each other")
    assert run_preflight(job, EXIT_HANG, {0: waited, 2: waited}) == EXIT_UNFIT_NODE
    assert (
        job.attempt.unfit_nodes == ["n2"] and "n2: none of its ranks answered" in job.attempt.error
    )


def test_nodes_are_not_blamed_for_a_node_that_failed_at_once(job: Job) -> None:
    """srun killed their ranks; the job must not continue on the failing node alone."""
    assert (
        run_preflight(
            job,
            1,
            {
                2: (
                    1,
                    "preflight: the ranks do not reach each other (no address for ib0)",
                )
            },
        )
        == 1
    )
    assert job.attempt.unfit_nodes == [] and "ib0" in job.attempt.error


def test_a_torn_record_has_its_code_in_its_name(job: Job) -> None:
    records = job.run.parent / "records"
    records.mkdir()
    (records / "rank-0.75.json").write_text('{"code": 75, "err')
    (records / "rank-1.2.json").write_text('{"code": 2, "error": "", "time": 1.0, "node": "n2"}')
    read = [(r["rank"], r["code"], r["node"]) for r in read_exit_records(records)]
    assert read == [("rank-1", 2, "n2"), ("rank-0", 75, "")]


def test_a_rank_that_could_not_write_its_record(job: Job) -> None:
    """The file's name has its exit code, also if srun reports that of a rank which it ended."""
    records = job.run.parent / "records"
    records.mkdir()
    (records / "code").write_text("75")
    (records / "rank-0.2.json").touch()
    (records / "rank-1.75.json").touch()
    assert job._run_command(0, [], ["train"], 1) == 2
    assert job.attempt.error == (
        f"rank-0 exited with code 2 and could not write why, so the disk of {job.run} may be full"
    )


def test_ranks_that_could_not_create_a_record(job: Job) -> None:
    """The exit code shows that they were not killed."""
    records = job.run.parent / "records"
    records.mkdir()
    (records / "code").write_text("2")
    assert job._run_command(0, [], ["train"], 1) == 2
    assert job.attempt.error.endswith(
        f"(exit code 2): it could not write why, so the disk of {job.run} may be full"
    )


def test_an_attempt_that_cannot_be_recorded_continues(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.file.parent.mkdir()
    job.file.symlink_to("/dev/full")
    monkeypatch.setattr(job, "_run_commands", lambda: 0)
    assert job.execute() == 0
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    unrecorded = (
        f"train: {job.file} cannot be written (No space left on device): `pocl status` will not "
        "show this attempt"
    )
    assert lines == [
        "train: attempt 1 as job 7 on n1, n2, n3",
        unrecorded,
        unrecorded,
        "train: done: finished",
    ]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert job.execute() == 0
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_the_signal_to_stop_is_recorded_before_the_job_ends(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[str] = []
    monkeypatch.setattr("pocl_ds.cluster.job_runner.REPEAT_SIGNAL_SECONDS", 0.0)
    monkeypatch.setattr(
        job,
        "_signal_ranks",
        lambda: recorded.extend(attempt.stop_reason for attempt in read_attempts(job.file)),
    )
    (job.run.parent / "bin" / "srun").write_text("#!/bin/sh\nexec sleep 2.5\n")
    job.attempt.stop_reason = "SIGTERM"
    job._run_command(0, [], ["train"], 1)
    assert recorded[-1:] == ["SIGTERM"]
