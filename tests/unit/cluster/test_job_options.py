"""The options of sbatch: of the profile, of one job, and SLURM's sizes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.cluster.job_graph import JobSpec
from pocl_ds.cluster.job_options import job_limits, parse_memory, parse_time, sbatch_options
from pocl_ds.cluster.profile import Profile, check_profile
from pocl_ds.errors import RecipeError

TRAIN = JobSpec(
    "train", ("train",), (), after=("plan",), nodes=2, cpus_per_task=8, whole_nodes=True
)
SCORE = JobSpec("score", ("score",), (), cpus_per_task=3)


def profile(**fields: Any) -> Profile:
    return check_profile({"name": "here", "cpus_per_node": 8, **fields}, "here")


def options(used: Profile, job: JobSpec, *, is_last: bool = False) -> list[str]:
    return sbatch_options(
        used, job, run_name="x", log="/run/logs/a.log", directory="/here", is_last=is_last
    )


def test_a_job_has_options_of_its_own() -> None:
    used = profile(
        partition="gpu",
        account="group",
        qos="normal",
        time="24:00:00",
        options=["--comment=all"],
        jobs={
            "score": {
                "partition": "cpu",
                "qos": "long",
                "nodelist": "n[1-3]",
                "cpus_per_task": 5,
                "options": ["--nice=10"],
            }
        },
    )
    train, score = options(used, TRAIN), options(used, SCORE)
    assert {"--partition=gpu", "--account=group", "--qos=normal", "--cpus-per-task=8"} <= set(train)
    assert {"--partition=cpu", "--account=group", "--qos=long", "--cpus-per-task=5"} <= set(score)
    assert "--nodelist=n[1-3]" in score and not any("nodelist" in word for word in train)
    assert (
        score[-3:] == ["--requeue", "--comment=all", "--nice=10"] and train[-1] == "--comment=all"
    )
    assert "--time=24:00:00" in score


@pytest.mark.parametrize(
    ("memory", "train", "score"),
    [(None, None, None), ("0", "0", None), ("64G", "64G", "24576M"), ("100", "100", "38M")],
)
def test_a_job_gets_the_memory_that_its_cores_are_of_a_node(
    memory: str | None, train: str | None, score: str | None
) -> None:
    used = profile(memory=memory)
    assert job_limits(used, TRAIN).memory == train and job_limits(used, SCORE).memory == score
    own = profile(memory=memory, jobs={"score": {"memory": "7G"}})
    assert job_limits(own, SCORE).memory == "7G"


def test_mail_comes_at_the_end_and_waiting_is_for_the_first_jobs() -> None:
    used = profile(mail="me@example.com", begin="now+1hour", dependency="afterok:12")
    first, last = options(used, SCORE), options(used, TRAIN, is_last=True)
    assert {"--mail-user=me@example.com", "--mail-type=FAIL", "--begin=now+1hour"} <= set(first)
    assert "--dependency=afterok:12" in first
    assert "--mail-type=END,FAIL" in last
    assert not any(word.startswith(("--begin", "--dependency")) for word in last)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("time", 90, 'field time=90: .* write it in quotes, as in "90"'),
        ("setup", "module load cuda", r"write a list, as in \[a, b\]"),
        ("environment", {"A": 1}, 'environment.A=1: .* write it in quotes, as in "1"'),
        ("environment", "A=1", "write a table"),
        ("exclude", ["n1", "n2"], 'write one text, as in "n1,n2"'),
        ("gpus_per_node", "eight", "write a whole number, as in 8"),
        ("gres", "perhaps", "write true or false"),
        ("jobs", {"score": {"qos": 3}}, r"jobs.score.qos=3: .*in quotes"),
    ],
)
def test_a_wrong_type_says_what_to_write(field: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        profile(**{field: value})


@given(
    days=st.integers(0, 40),
    hours=st.integers(0, 23),
    minutes=st.integers(0, 59),
    seconds=st.integers(0, 59),
)
def test_time_limits_in_all_forms(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = (days * 24 + hours) * 60 + minutes + seconds / 60
    assert parse_time(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == pytest.approx(total)
    assert parse_time(f"{days * 24 + hours}:{minutes:02}:{seconds:02}") == pytest.approx(total)
    assert parse_time(f"{days}-{hours}:{minutes}") == (days * 24 + hours) * 60 + minutes
    assert parse_time(f"{days}-{hours}") == (days * 24 + hours) * 60
    assert parse_time(f"{minutes}:{seconds:02}") == pytest.approx(minutes + seconds / 60)
    assert parse_time(f"{minutes}") == minutes


def test_memory_sizes() -> None:
    sizes = {"512": 512, "2G": 2048, "1T": 1024**2, "1024K": 1, "0": 0, None: 0, "4gb": 4096}
    assert {text: parse_memory(text) for text in sizes} == sizes
