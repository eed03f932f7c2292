"""A job's own program: whom it holds responsible for a step that failed."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.cluster.attempts import read_attempts
from pocl_ds.cluster.job import Job
from pocl_ds.errors import HANG, UNFIT
from pocl_ds.runtime.process_exit import words_of_ranks

LOOK = ["--module", "pocl_ds.cluster.preflight"]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job on three nodes, in a world without SLURM."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(
        "#!/bin/sh\n[ \"$2\" != hostnames ] || printf 'n1\\nn2\\nn3\\n'\n"
    )
    leave = 'mkdir -p "$POCL_EXITS"; cp "$SAID"/*.json "$POCL_EXITS"; exit "$(cat "$SAID"/code)"'
    (programs / "srun").write_text(f"#!/bin/sh\n{leave}\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    spec = {
        "name": "train",
        "nodes": 3,
        "cpus_per_task": 1,
        "container": None,
        "python": "python3",
        "gpus_per_node": 0,
        "attempts": 3,
    }
    (tmp_path / "run" / "cluster" / "jobs").mkdir(parents=True)
    (tmp_path / "run" / "cluster" / "jobs" / "train.json").write_text(json.dumps(spec))
    return Job(tmp_path / "run", "train")


def step(job: Job, code: int, words: dict[int, tuple[int, str]]) -> int:
    """The exit code of a look at the nodes that ended with `code`; words: rank -> its own code and
    its sentence.
    """
    said = job.run.parent / "said"
    said.mkdir()
    (said / "code").write_text(str(code))
    for rank, (own, error) in words.items():
        word: dict[str, Any] = {"code": own, "error": error, "time": rank, "node": f"n{rank + 1}"}
        (said / f"rank-{rank}.json").write_text(json.dumps(word))
    return job._step(0, LOOK, ["train"], 1)


@pytest.mark.parametrize("code", [UNFIT, 2])
def test_a_rank_that_was_ended_before_it_could_speak_is_not_blamed(job: Job, code: int) -> None:
    """The first rank to leave with a code makes srun end the others: a fit node may then be without
    a word.
    """
    assert (
        step(job, code, {0: (code, "preflight: n1: 7 of 8 promised GPUs are visible"), 1: (0, "")})
        == code
    )
    assert job.attempt.error == "preflight: n1: 7 of 8 promised GPUs are visible"
    assert job.attempt.suspects == (["n1"] if code == UNFIT else [])


def test_a_node_whose_ranks_never_came_is_left_out(job: Job) -> None:
    lost = (HANG, "preflight: the ranks do not reach each other")
    assert step(job, HANG, {0: lost, 2: lost}) == UNFIT
    assert (
        job.attempt.suspects == ["n2"] and "n2: no rank of it came to answer" in job.attempt.error
    )


def test_a_node_that_failed_at_once_does_not_make_the_others_suspect(job: Job) -> None:
    """Its end made srun end them: they were whole, and the job must not keep to the one that is
    not.
    """
    assert (
        step(
            job,
            1,
            {
                2: (
                    1,
                    "preflight: the ranks do not reach each other (Unable to find address for: ib0)",
                )
            },
        )
        == 1
    )
    assert job.attempt.suspects == [] and "ib0" in job.attempt.error


def test_a_rank_that_was_ended_while_it_wrote_has_left_no_word(job: Job) -> None:
    said = job.run.parent / "said"
    said.mkdir()
    (said / "rank-0.json").write_text('{"code": 75, "err')
    (said / "rank-1.json").write_text('{"code": 75, "error": "", "time": 1.0, "node": "n2"}')
    assert [word["rank"] for word in words_of_ranks(said)] == ["rank-1"]


def test_a_rank_that_found_no_room_for_its_word(job: Job) -> None:
    """Its code tells that it was not killed."""
    said = job.run.parent / "said"
    said.mkdir()
    (said / "code").write_text("2")
    (said / "rank-1.json").touch()
    assert job._step(0, [], ["train"], 1) == 2
    assert job.attempt.error.endswith(
        f"(exit code 2): it found no room to say why, so the disk of {job.run} may be full"
    )


def test_an_attempt_that_cannot_be_noted_goes_on(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.file.parent.mkdir()
    job.file.symlink_to("/dev/full")
    monkeypatch.setattr(job, "_steps", lambda: 0)
    assert job.go() == 0
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    unknown = f"train: {job.file} cannot be written (No space left on device): `pocl status` will not know of this"
    assert lines == [
        "train: attempt 1 as job 7 on n1, n2, n3",
        unknown,
        unknown,
        "train: done: finished",
    ]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert job.go() == 0
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_that_a_job_was_asked_to_leave_is_known_also_where_it_is_killed(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[str] = []
    monkeypatch.setattr("pocl_ds.cluster.job.AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(
        job, "_ask", lambda: known.extend(one.stopped for one in read_attempts(job.file))
    )
    (job.run.parent / "bin" / "srun").write_text("#!/bin/sh\nexec sleep 2.5\n")
    job.attempt.stopped = "SIGTERM"
    job._step(0, [], ["train"], 1)
    assert known[-1:] == ["SIGTERM"]
