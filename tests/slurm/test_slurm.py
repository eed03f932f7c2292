"""Whole runs on a real SLURM cluster, undisturbed and disturbed in every way a cluster knows: they
end in the same student.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import yaml
from command_line import ROOT
from safetensors.torch import load_file
from slurm_cluster import BASE, Cluster
from tiny_runs import write_recipe

from pocl_ds.cluster.attempts import Attempt
from pocl_ds.runtime.metrics import read_metrics

pytestmark = pytest.mark.timeout(900)
PROFILE = "test-cluster"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where every user may read and write: pytest's own folders are root's alone."""
    path = Path(tempfile.mkdtemp(prefix="pocl-slurm-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(
        path, ignore_errors=True
    )  # a job that was just cancelled may still write its last line


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    """Models, data and a recipe with dropout, two ranks, and a training that lasts long enough to
    be disturbed.
    """
    teacher = tiny_models.llama(folder / "teacher", tied=False, seed=1)
    student = tiny_models.llama(folder / "student")
    for weights in folder.glob("*/*.safetensors"):
        weights.chmod(0o644)
    return write_recipe(
        folder,
        teacher,
        student,
        max_train_samples=56,
        student={"heal_steps": 2, "dropout": 0.1},
        curriculum={"epochs_per_stage": 8},
        train={"checkpoint": {"every_n_steps": 4}},
    )


def steps(run: Path) -> list[dict[str, Any]]:
    kept = (
        "step",
        "loss",
        "kd_loss",
        "sft_loss",
        "temperature",
        "sft_ratio",
        "lr",
        "grad_norm",
        "sample_ids_digest",
    )
    return [
        {key: record[key] for key in kept}
        for record in read_metrics(run / "train" / "metrics.jsonl")
    ]


def recorded(run: Path) -> int:
    path = run / "train" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def attempts(run: Path, label: str) -> list[dict[str, Any]]:
    path = run / "cluster" / "attempts" / f"{label}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return list({line["number"]: line for line in lines}.values())


def done(run: Path) -> bool:
    return (run / "report" / "manifest.json").is_file()


def assert_equal(run: Path, other: Path) -> None:
    """The same steps and weights, bit by bit."""
    assert steps(run) == steps(other)
    ours, theirs = (
        load_file(path / "train" / "final" / "model.safetensors") for path in (run, other)
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def planned_copy(run: Path, target: Path) -> Path:
    """The run up to its plan."""
    left_out = ("train", "evaluation", "export", "report", "logs", "cluster", ".lock")
    shutil.copytree(run, target, ignore=shutil.ignore_patterns(*left_out))
    return target


@pytest.fixture(scope="module")
def calm(cluster: Cluster, folder: Path, recipe: Path) -> Path:
    """A run that nobody disturbs, from its data to the report; its name would be two commands to a
    careless shell.
    """
    run = folder / "calm run; touch x"
    cluster.pocl("submit", str(recipe), "--profile", PROFILE, "--run-dir", str(run))
    cluster.until(lambda: done(run), "the undisturbed run")
    return run


def test_a_pipeline_comes_to_its_report(cluster: Cluster, calm: Path) -> None:
    said = cluster.pocl("status", "--run-dir", str(calm)).stdout
    assert [line.split()[2] for line in said.splitlines()[1:7]] == ["done"] * 6
    assert len(steps(calm)) == 104 and "step 104/104" in said and "2/2 shards" in said
    assert not (calm.parent / "x").exists()
    log = (calm / "logs" / "train-a1-preflight-rank-0.log").read_text()
    assert "2 ranks on 2 nodes agree, an all-reduce moves" in log
    assert "nothing to submit" in cluster.pocl("resume", "--run-dir", str(calm)).stdout


def held_profile(folder: Path, **fields: Any) -> str:
    """The profile with other fields, and jobs that wait for a release: time to change what they
    run.
    """
    path = folder / "held.yaml"
    shipped = yaml.safe_load(
        (Path(__file__).parents[2] / "slurm" / "profiles" / "test-cluster.yaml").read_text()
    )
    path.write_text(
        yaml.safe_dump({**shipped, "options": ["--hold"], "preflight_seconds": 15, **fields})
    )
    return str(path)


def release(cluster: Cluster, run: Path) -> None:
    for path in sorted((run / "cluster" / "jobs").glob("*.ids")):
        cluster.call("scontrol", "release", path.read_text().split()[-1])


def submit_changed(cluster: Cluster, run: Path, folder: Path, line: str, **fields: Any) -> None:
    """Submit a run whose frozen code executes a line more at the beginning of each training step."""
    cluster.pocl("submit", "--profile", held_profile(folder, **fields), "--run-dir", str(run))
    file = run / "cluster" / "code" / "pocl_ds" / "distill" / "trainer.py"
    mark = "                position = self.sampler.position(step)\n"
    text = file.read_text()
    assert mark in text
    file.write_text(text.replace(mark, f"{mark}                {line}\n"))
    release(cluster, run)


def test_preempted_cut_off_and_with_a_node_killed(
    cluster: Cluster, calm: Path, folder: Path
) -> None:
    """A pipeline from its data on; what happens to its training costs time, and nothing else. Steps
    are slow enough to be hit.
    """
    run = folder / "ordeal"
    run.mkdir()
    shutil.copy(calm / "recipe.yaml", run)
    submit_changed(cluster, run, folder, "time.sleep(0.5)")
    moments = {}

    def trained(more: int) -> None:
        before = recorded(run)
        job = cluster.job(run, "train")
        cluster.until(
            lambda: cluster.state(job) == "RUNNING" and recorded(run) >= before + more,
            f"{more} more steps",
        )

    def again(attempt: int) -> None:
        cluster.until(
            lambda: len(attempts(run, "train")) > attempt or done(run),
            f"an attempt after {attempt}",
        )

    trained(6)
    moments["training"] = cluster.pocl("status", "--run-dir", str(run)).stdout
    urgent = cluster.call(
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 3",
    ).strip()
    cluster.until(lambda: cluster.state(urgent) == "COMPLETED", "the urgent job")
    moments["preempted"] = cluster.pocl("status", "--run-dir", str(run)).stdout
    again(1)
    trained(6)
    # One minute is the least that SLURM knows; the signal, 60 s before it, comes at once.
    cluster.call("scontrol", "update", f"JobId={cluster.job(run, 'train')}", "TimeLimit=1")
    cluster.until(
        lambda: attempts(run, "train")[1]["outcome"] == "again", "the time limit's signal"
    )
    cluster.call(
        "scontrol", "update", f"JobId={cluster.job(run, 'train')}", "TimeLimit=30", check=False
    )
    moments["cut off"] = cluster.pocl("status", "--run-dir", str(run)).stdout
    again(2)
    trained(6)
    cluster.script("kill", "n1")  # with the job's own program: it ends without a word
    cluster.until(
        lambda: cluster.state(cluster.job(run, "train")) not in ("RUNNING", "COMPLETING"),
        "the node to be missed",
    )
    cluster.script("up")
    again(3)
    cluster.until(lambda: done(run), "the end")
    moments["end"] = cluster.pocl("status", "--run-dir", str(run)).stdout
    if path := os.environ.get("POCL_MOMENTS"):
        Path(path).write_text("\n".join(f"== {name}\n{text}" for name, text in moments.items()))
    assert cluster.state(cluster.job(run, "report")) == "COMPLETED"
    found = attempts(run, "train")
    assert [attempt["stopped"] for attempt in found[:2]] == ["preemption", "SIGUSR2"]
    assert found[2]["end"] is None and found[3]["outcome"] == "done"
    assert "again" not in moments["end"] and moments["training"].count("waits for") >= 2
    assert_equal(run, calm)


def test_preempted_without_a_grace_time(cluster: Cluster, calm: Path, folder: Path) -> None:
    """TERM, and five seconds later KILL (KillWait), once before the first step: none of that is an
    attempt that failed.
    """
    run = planned_copy(calm, folder / "abrupt")
    submit_changed(cluster, run, folder, "time.sleep(0.3)", partition="abrupt", attempts=1)
    for number, before in ((1, 0), (2, 10)):
        cluster.until(
            lambda number=number: len(attempts(run, "train")) == number, f"attempt {number}"
        )
        cluster.until(lambda before=before: recorded(run) >= before, f"{before} steps")
        urgent = cluster.call(
            "sbatch",
            "--parsable",
            "--partition=high",
            "--nodes=3",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=sleep 1",
        ).strip()
        cluster.until(lambda urgent=urgent: cluster.state(urgent) == "COMPLETED", "the urgent job")
    cluster.until(lambda: (run / "train" / "manifest.json").is_file(), "the end of training")
    cluster.pocl("cancel", "--run-dir", str(run))
    found = attempts(run, "train")
    assert len(found) == 3 and found[2]["outcome"] == "done"
    assert not any(Attempt(**one).counts for one in found[:2]) and found[1]["progress"] >= 10
    assert_equal(run, calm)


def test_requeued_cancelled_and_resumed(cluster: Cluster, calm: Path, folder: Path) -> None:
    run = planned_copy(calm, folder / "requeued")
    submit_changed(cluster, run, folder, "time.sleep(0.1)")
    refused = cluster.pocl("submit", "--profile", PROFILE, "--run-dir", str(run), check=False)
    assert refused.returncode == 2 and "wait or run" in refused.stderr
    cluster.until(lambda: recorded(run) >= 6, "six steps")
    cluster.call("scontrol", "requeue", cluster.job(run, "train"))
    cluster.until(
        lambda: len(attempts(run, "train")) == 2 and recorded(run) >= 12, "a second attempt"
    )
    assert "cancelled" in cluster.pocl("cancel", "--run-dir", str(run)).stdout
    job = cluster.job(run, "train")
    cluster.until(
        lambda: cluster.state(job) == "CANCELLED" and attempts(run, "train")[1]["end"],
        "the cancellation",
    )
    assert [attempt["outcome"] for attempt in attempts(run, "train")] == ["ended", "ended"]
    assert "cancelled" in cluster.pocl("status", "--run-dir", str(run)).stdout.splitlines()[1]
    assert "submitted train" in cluster.pocl("resume", "--run-dir", str(run)).stdout
    release(cluster, run)
    cluster.until(lambda: (run / "train" / "manifest.json").is_file(), "the end of training")
    cluster.pocl("cancel", "--run-dir", str(run))
    assert_equal(run, calm)


def test_an_array_task_that_is_killed_goes_alone(
    cluster: Cluster, calm: Path, folder: Path
) -> None:
    run = planned_copy(calm, folder / "array")
    for name in ("scores", "ranking", "plan"):
        shutil.rmtree(run / name)
    cluster.pocl("submit", "--profile", PROFILE, "--run-dir", str(run))
    cluster.until(lambda: len(attempts(run, "score-1")) == 1, "the second shard to begin")
    pids = ""
    while not pids:
        words = f"pocl.py pocl_ds.cli.main score --shard 1/2 --run-dir {run}"
        pids = subprocess.run(["pgrep", "-f", words], capture_output=True, text=True).stdout
    subprocess.run(["kill", "-9", *pids.split()], check=True)
    cluster.until(lambda: (run / "plan" / "manifest.json").is_file(), "the plan")
    assert [attempt["outcome"] for attempt in attempts(run, "score-1")] == ["again", "done"]
    assert [attempt["outcome"] for attempt in attempts(run, "score-0")] == ["done"]
    cluster.pocl("cancel", "--run-dir", str(run))
    for file in ("shard-00000-of-00002.jsonl", "shard-00001-of-00002.jsonl"):
        assert (run / "scores" / file).read_bytes() == (calm / "scores" / file).read_bytes()


def test_a_crash_that_comes_again_is_the_end(cluster: Cluster, calm: Path, folder: Path) -> None:
    """A defect in what the job runs: one more attempt, then what waits for it is cancelled, and
    status shows the error.
    """
    run = planned_copy(calm, folder / "crash")
    submit_changed(
        cluster, run, folder, "if step == 6: raise IndexError(f'a defect at {id(self):#x}')"
    )
    cluster.until(lambda: cluster.state(cluster.job(run, "train")) == "FAILED", "the failure")
    cluster.until(
        lambda: cluster.state(cluster.job(run, "report")) == "CANCELLED", "the rest to be cancelled"
    )
    found = attempts(run, "train")
    assert [attempt["outcome"] for attempt in found] == ["again", "failed"]
    said = cluster.pocl("status", "--run-dir", str(run)).stdout
    assert "the same error at the same place as in attempt 1: IndexError: a defect" in said
    rows = {line.split()[0]: line for line in said.splitlines()[1:4]}
    assert (
        "failed" in rows["train"]
        and "cancelled" in rows["evaluate"]
        and "cancelled" in rows["report"]
    )
    assert (
        "since train did not finish" in said
        and "Traceback" not in cluster.pocl("logs", "--run-dir", str(run), "train").stdout[:50]
    )


def test_the_same_launcher_in_an_allocation(cluster: Cluster, calm: Path, folder: Path) -> None:
    """In `salloc` launch/train.sh spreads the ranks over the nodes by itself."""
    run = planned_copy(calm, folder / "allocated")
    words = [
        "salloc",
        "--nodes=2",
        "--ntasks-per-node=1",
        "bash",
        "launch/train.sh",
        "--ranks",
        "2",
        "train",
    ]
    where = {**cluster.environment, "POCL_PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "eth0"}
    done = subprocess.run(
        [*words, "--run-dir", str(run)],
        cwd=ROOT,
        env=where,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((run / "train" / "manifest.json").read_text())["info"]["ranks"] == 2
    assert_equal(run, calm)


def test_several_recipes_are_several_runs(cluster: Cluster, recipe: Path, folder: Path) -> None:
    """Nothing is submitted before all are looked at; status, cancel and resume take the folder of
    all.
    """
    study, other = folder / "study", folder / "other.yaml"
    other.write_text(
        recipe.read_text()
        .replace("name: tiny", "name: other")
        .replace("strategy: fusion", "strategy: random")
    )
    twice = cluster.pocl(
        "submit",
        str(recipe),
        str(recipe),
        "--profile",
        PROFILE,
        "--run-dir",
        str(study),
        check=False,
    )
    assert twice.returncode == 2 and "a name of its own" in twice.stderr and not study.exists()
    said = cluster.pocl(
        "submit", str(recipe), str(other), "--profile", PROFILE, "--run-dir", str(study)
    ).stdout
    assert said.count("submitted prepare") == 2
    said = cluster.pocl("status", "--run-dir", str(study)).stdout
    assert {"tiny", "other"} < set(said.splitlines()) and said.count("job       id") == 2
    assert len(cluster.pocl("cancel", "--run-dir", str(study)).stdout.partition(";")[0].split(",")) == 12
    ids = [cluster.job(study / name, "init-student") for name in ("tiny", "other")]
    cluster.until(lambda: all(cluster.state(job) == "CANCELLED" for job in ids), "the cancellation")


def test_a_fault_of_the_users_is_the_end_at_once(
    cluster: Cluster, calm: Path, folder: Path
) -> None:
    run = planned_copy(calm, folder / "fault")
    plan = run / "plan" / "plan.json"
    plan.write_text("{" * plan.stat().st_size)  # of another size it would be made again
    cluster.pocl("submit", "--profile", PROFILE, "--run-dir", str(run))
    cluster.until(lambda: cluster.state(cluster.job(run, "train")) == "FAILED", "the failure")
    assert [attempt["outcome"] for attempt in attempts(run, "train")] == ["failed"]
    assert "plan.json is damaged" in cluster.pocl("status", "--run-dir", str(run)).stdout


def test_a_full_disk_is_the_end_until_there_is_room(
    cluster: Cluster, calm: Path, folder: Path
) -> None:
    """Ranks and job find no room to say why: it is told all the same, and no finished work is lost."""
    disk = BASE / "small"
    run, filler = planned_copy(calm, disk / "run"), disk / "filler"
    fill = f"import shutil; open({str(filler)!r}, 'wb').write(bytes(shutil.disk_usage({str(disk)!r}).free))"
    submit_changed(
        cluster, run, folder, f"if step == 21 and distributed.rank() == 0: exec({fill!r})"
    )
    cluster.until(lambda: cluster.state(cluster.job(run, "train")) == "FAILED", "the failure")
    cluster.until(
        lambda: cluster.state(cluster.job(run, "report")) == "CANCELLED", "the rest to be cancelled"
    )
    said = cluster.pocl("status", "--run-dir", str(run)).stdout
    assert "full" in said and "since train did not finish" in said, said + cluster.newest_logs()
    filler.unlink()
    cluster.pocl("resume", "--run-dir", str(run))
    release(cluster, run)
    cluster.until(lambda: done(run), "the resumed run")
    assert_equal(run, calm)
    shutil.rmtree(run)


def test_an_unfit_node_is_left_out(cluster: Cluster, calm: Path, folder: Path) -> None:
    run = planned_copy(calm, folder / "unfit")
    cluster.pocl("submit", "--profile", held_profile(folder), "--run-dir", str(run))
    first = cluster.job(run, "train")
    cluster.script("hide", "n2", str(run))
    try:
        release(cluster, run)
        cluster.until(lambda: cluster.job(run, "train") != first, "another job in its place")
        release(cluster, run)
        cluster.until(lambda: (run / "train" / "manifest.json").is_file(), "the end of training")
        found = attempts(run, "train")
        assert found[0]["suspects"] == ["n2"] and "n2" in found[0]["why"]
        assert sorted(found[1]["nodes"]) == ["n1", "n3"]
        cluster.until(
            lambda: cluster.state(cluster.job(run, "evaluate")) in ("RUNNING", "COMPLETED"),
            "what waited for both",
        )
    finally:
        cluster.script("show", "n2", str(run))
        cluster.pocl("cancel", "--run-dir", str(run))
    assert_equal(run, calm)


def python_for_nobody(cluster: Cluster) -> tuple[str, dict[str, str]]:
    """An interpreter that user nobody may start, and the environment in which it finds what this
    one has; else a skip.
    """
    packages = f"{ROOT}:{sysconfig.get_path('purelib')}"
    path = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"
    }  # root's may name folders that only root may enter
    candidates = [
        (sys.executable, path),
        (f"/usr/bin/python3.{sys.version_info[1]}", {**path, "PYTHONPATH": packages}),
    ]
    for python, environment in candidates:
        command = [
            "runuser",
            "-u",
            "nobody",
            "--",
            python,
            "-c",
            "import torch, deepspeed, pocl_ds.cli.main",
        ]
        where = {
            **cluster.environment,
            **environment,
            "DS_ACCELERATOR": "cpu",
            "HOME": "/nonexistent",
        }
        if subprocess.run(command, cwd=ROOT, env=where, capture_output=True).returncode == 0:
            return python, environment
    pytest.skip(
        "user nobody can start no Python with these packages: they lie where only root may look"
    )


def test_two_runs_at_once_one_of_another_user(cluster: Cluster, calm: Path, folder: Path) -> None:
    python, environment = python_for_nobody(cluster)
    home = folder / "home"
    home.mkdir()
    home.chmod(0o777)
    runs = [planned_copy(calm, folder / "twin"), planned_copy(calm, home / "twin")]
    subprocess.run(["chown", "-R", "nobody", str(runs[1])], check=True)
    cluster.pocl("submit", "--profile", PROFILE, "--run-dir", str(runs[0]))
    cluster.pocl(
        "submit",
        "--profile",
        PROFILE,
        "--run-dir",
        str(runs[1]),
        user="nobody",
        python=python,
        HOME=str(home),
        **environment,
    )
    for run in runs:
        cluster.until(
            lambda run=run: [a["outcome"] for a in attempts(run, "train")] == ["done"],
            "both trainings",
        )
        assert_equal(run, calm)
    starts = [attempts(run, "train")[0] for run in runs]
    assert starts[0]["start"] < starts[1]["end"] and starts[1]["start"] < starts[0]["end"], (
        "they ran at the same time"
    )
    assert (runs[1] / "train" / "manifest.json").owner() == "nobody"
    for run in runs:
        cluster.pocl("cancel", "--run-dir", str(run))


def test_a_study_is_submitted_again_for_what_waited(
    cluster: Cluster, recipe: Path, folder: Path
) -> None:
    """Two orders of the same scores: the second run waits for them, takes them over, and submits
    what is its own.
    """
    study, runs = folder / "orders.yaml", folder / "orders"
    arms = {"paper": [], "close": ["ranking.k=1"]}
    study.write_text(
        yaml.safe_dump(
            {"name": "orders", "base": str(recipe), "arms": arms, "until": "rank"}, sort_keys=False
        )
    )
    command = ("study", str(study), "--run-dir", str(runs), "--profile", PROFILE)
    said = cluster.pocl(*command).stdout
    assert "paper-seed42: prepare, score, plan" in said and "submitted 1 of 2 cells; 1 more" in said
    cluster.until(
        lambda: (runs / "paper-seed42" / "ranking" / "manifest.json").is_file(), "the first order"
    )
    said = cluster.pocl(*command).stdout
    assert "close-seed42: plan\n" in said and "submitted 1 of 2 cells; 0 more" in said
    cluster.until(
        lambda: (runs / "close-seed42" / "ranking" / "manifest.json").is_file(), "the second order"
    )
    said = cluster.pocl(*command).stdout  # all is there: the same command shows it
    assert "paper-seed42, close-seed42" in said and "submitted" not in said
    assert not (runs / "paper-seed42" / "train").exists()
