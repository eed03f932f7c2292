"""Complete runs on a real SLURM cluster. Preempted, requeued, timed-out and moved runs end with the
same student as an undisturbed one.
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
    """A folder that every user may read and write, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="pocl-slurm-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path, ignore_errors=True)  # a cancelled job may still be writing


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    """Models, data and a recipe with dropout and two ranks, whose training takes long enough to be
    disturbed.
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


def step_records(run: Path) -> list[dict[str, Any]]:
    keys = (
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
        {key: record[key] for key in keys}
        for record in read_metrics(run / "train" / "metrics.jsonl")
    ]


def recorded_steps(run: Path) -> int:
    path = run / "train" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def attempts(run: Path, label: str) -> list[dict[str, Any]]:
    path = run / "cluster" / "attempts" / f"{label}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return list({line["number"]: line for line in lines}.values())


def is_finished(run: Path) -> bool:
    return (run / "report" / "manifest.json").is_file()


def assert_equal(run: Path, other: Path) -> None:
    """Both runs have bitwise equal metrics and weights."""
    assert step_records(run) == step_records(other)
    weights, expected = (
        load_file(path / "train" / "final" / "model.safetensors") for path in (run, other)
    )
    assert all(weights[name].equal(expected[name]) for name in expected)


def planned_copy(run: Path, target: Path) -> Path:
    """A copy of a run up to its plan."""
    ignored = ("train", "evaluation", "export", "report", "logs", "cluster", ".lock")
    shutil.copytree(run, target, ignore=shutil.ignore_patterns(*ignored))
    return target


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, folder: Path, recipe: Path) -> Path:
    """An undisturbed run. Unquoted, its name would be two shell commands."""
    run = folder / "undisturbed run; touch x"
    cluster.pocl("submit", str(recipe), "--profile", PROFILE, "--run-dir", str(run))
    cluster.until(lambda: is_finished(run), "the undisturbed run")
    return run


def test_a_submitted_run_finishes(cluster: Cluster, undisturbed: Path) -> None:
    output = cluster.pocl("status", "--run-dir", str(undisturbed)).stdout
    assert [line.split()[2] for line in output.splitlines()[1:7]] == ["done"] * 6
    assert (
        len(step_records(undisturbed)) == 104
        and "step 104/104" in output
        and "2/2 shards" in output
    )
    assert not (undisturbed.parent / "x").exists()
    log = (undisturbed / "logs" / "train-a1-preflight-rank-0.log").read_text()
    assert "2 ranks on 2 nodes agree, an all-reduce moves" in log
    assert "nothing to submit" in cluster.pocl("resume", "--run-dir", str(undisturbed)).stdout


def held_profile(folder: Path, **fields: Any) -> str:
    """The profile with other fields, whose jobs are held, so that a test can change their code."""
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
    """Submit a run whose frozen code runs one more line in each optimizer step."""
    cluster.pocl("submit", "--profile", held_profile(folder, **fields), "--run-dir", str(run))
    file = run / "cluster" / "code" / "pocl_ds" / "training" / "trainer.py"
    anchor = "                position = schedule.sampler.position(step)\n"
    text = file.read_text()
    assert anchor in text
    file.write_text(text.replace(anchor, f"{anchor}                {line}\n"))
    release(cluster, run)


def test_a_preempted_timed_out_run_that_lost_a_node(
    cluster: Cluster, undisturbed: Path, folder: Path
) -> None:
    """A complete run with slow optimizer steps. An interruption of its training costs only time."""
    run = folder / "disturbed"
    run.mkdir()
    shutil.copy(undisturbed / "recipe.yaml", run)
    submit_changed(cluster, run, folder, "import time; time.sleep(0.5)")
    status_outputs = {}

    def wait_for_steps(more: int) -> None:
        before = recorded_steps(run)
        job = cluster.job(run, "train")
        cluster.until(
            lambda: cluster.state(job) == "RUNNING" and recorded_steps(run) >= before + more,
            f"{more} more optimizer steps",
        )

    def wait_for_attempt_after(attempt: int) -> None:
        cluster.until(
            lambda: len(attempts(run, "train")) > attempt or is_finished(run),
            f"an attempt after {attempt}",
        )

    wait_for_steps(6)
    status_outputs["training"] = cluster.pocl("status", "--run-dir", str(run)).stdout
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
    status_outputs["preempted"] = cluster.pocl("status", "--run-dir", str(run)).stdout
    wait_for_attempt_after(1)
    wait_for_steps(6)
    # One minute is SLURM's smallest limit; the signal, 60 s before it, comes at once.
    cluster.call("scontrol", "update", f"JobId={cluster.job(run, 'train')}", "TimeLimit=1")
    cluster.until(
        lambda: attempts(run, "train")[1]["outcome"] == "retry", "the time limit's signal"
    )
    cluster.call(
        "scontrol", "update", f"JobId={cluster.job(run, 'train')}", "TimeLimit=30", check=False
    )
    status_outputs["timed out"] = cluster.pocl("status", "--run-dir", str(run)).stdout
    wait_for_attempt_after(2)
    wait_for_steps(6)
    cluster.script(
        "kill", "n1"
    )  # also kills the job runner, so that the attempt has no recorded end
    cluster.until(
        lambda: cluster.state(cluster.job(run, "train")) not in ("RUNNING", "COMPLETING"),
        "the loss of the node",
    )
    cluster.script("up")
    wait_for_attempt_after(3)
    cluster.until(lambda: is_finished(run), "the end")
    status_outputs["end"] = cluster.pocl("status", "--run-dir", str(run)).stdout
    if path := os.environ.get("POCL_MOMENTS"):
        Path(path).write_text(
            "\n".join(f"== {name}\n{text}" for name, text in status_outputs.items())
        )
    assert cluster.state(cluster.job(run, "report")) == "COMPLETED"
    records = attempts(run, "train")
    assert [attempt["stop_reason"] for attempt in records[:2]] == ["preemption", "SIGUSR2"]
    assert records[2]["end"] is None and records[3]["outcome"] == "done"
    assert (
        "retry" not in status_outputs["end"] and status_outputs["training"].count("waits for") >= 2
    )
    assert_equal(run, undisturbed)


def test_preemption_without_a_grace_time_is_no_failure(
    cluster: Cluster, undisturbed: Path, folder: Path
) -> None:
    """SIGTERM, then SIGKILL after five seconds (KillWait), once before the first optimizer step."""
    run = planned_copy(undisturbed, folder / "abrupt")
    submit_changed(
        cluster, run, folder, "import time; time.sleep(0.3)", partition="abrupt", attempts=1
    )
    for number, before in ((1, 0), (2, 10)):
        cluster.until(
            lambda number=number: len(attempts(run, "train")) == number, f"attempt {number}"
        )
        cluster.until(lambda before=before: recorded_steps(run) >= before, f"{before} steps")
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
    records = attempts(run, "train")
    assert len(records) == 3 and records[2]["outcome"] == "done"
    assert not any(Attempt(**record).counts_against_job for record in records[:2])
    assert records[1]["progress"] >= 10
    assert_equal(run, undisturbed)


@pytest.mark.weekly
def test_a_teacher_on_a_node_of_its_own(cluster: Cluster, undisturbed: Path, folder: Path) -> None:
    """Two ranks of the student and one of the teacher, each on its node, preempted once."""
    run = planned_copy(undisturbed, folder / "own")
    words = ("--profile", PROFILE, "--run-dir", str(run), "teacher.placement=own_ranks")
    shown = cluster.pocl("submit", *words, "--dry-run").stdout
    assert "nodes 3 x tasks 1, 1 of them for the teacher" in shown
    cluster.pocl("submit", *words)
    cluster.until(lambda: recorded_steps(run) >= 10, "10 steps")
    urgent = cluster.call(
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ).strip()
    cluster.until(lambda: cluster.state(urgent) == "COMPLETED", "the urgent job")
    cluster.until(lambda: (run / "train" / "manifest.json").is_file(), "the end of training")
    cluster.pocl("cancel", "--run-dir", str(run))
    first, *others = attempts(run, "train")
    assert not Attempt(**first).counts_against_job and others[-1]["outcome"] == "done"
    teacher = (run / "logs" / "train-a1-train-rank-2.log").read_text()
    assert "rank 2 runs the teacher: ranks=1" in teacher
    assert_equal(run, undisturbed)


def test_a_run_that_is_requeued_cancelled_and_resumed(
    cluster: Cluster, undisturbed: Path, folder: Path
) -> None:
    run = planned_copy(undisturbed, folder / "requeued")
    submit_changed(cluster, run, folder, "import time; time.sleep(0.1)")
    refused = cluster.pocl("submit", "--profile", PROFILE, "--run-dir", str(run), check=False)
    assert refused.returncode == 2 and "wait or run" in refused.stderr
    cluster.until(lambda: recorded_steps(run) >= 6, "six optimizer steps")
    cluster.call("scontrol", "requeue", cluster.job(run, "train"))
    cluster.until(
        lambda: len(attempts(run, "train")) == 2 and recorded_steps(run) >= 12, "a second attempt"
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
    assert_equal(run, undisturbed)


def test_a_killed_array_task_is_retried_alone(
    cluster: Cluster, undisturbed: Path, folder: Path
) -> None:
    run = planned_copy(undisturbed, folder / "array")
    for name in ("scores", "ranking", "plan"):
        shutil.rmtree(run / name)
    cluster.pocl("submit", "--profile", PROFILE, "--run-dir", str(run))
    cluster.until(lambda: len(attempts(run, "score-1")) == 1, "the start of the second shard")
    pids = ""
    while not pids:
        pattern = f"pocl.py pocl_ds.cli.main score --shard 1/2 --run-dir {run}"
        pids = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout
    subprocess.run(["kill", "-9", *pids.split()], check=True)
    cluster.until(lambda: (run / "plan" / "manifest.json").is_file(), "the plan")
    assert [attempt["outcome"] for attempt in attempts(run, "score-1")] == ["retry", "done"]
    assert [attempt["outcome"] for attempt in attempts(run, "score-0")] == ["done"]
    cluster.pocl("cancel", "--run-dir", str(run))
    for file in ("shard-00000-of-00002.jsonl", "shard-00001-of-00002.jsonl"):
        assert (run / "scores" / file).read_bytes() == (undisturbed / "scores" / file).read_bytes()


def test_a_repeated_crash_ends_the_run(cluster: Cluster, undisturbed: Path, folder: Path) -> None:
    """A bug in a job's code gets one more attempt; then the waiting jobs are cancelled, and `pocl
    status` shows the error.
    """
    run = planned_copy(undisturbed, folder / "crash")
    submit_changed(
        cluster, run, folder, "if step == 6: raise IndexError(f'a bug at {id(self):#x}')"
    )
    cluster.until(lambda: cluster.state(cluster.job(run, "train")) == "FAILED", "the failure")
    cluster.until(
        lambda: cluster.state(cluster.job(run, "report")) == "CANCELLED",
        "the cancellation of the others",
    )
    records = attempts(run, "train")
    assert [attempt["outcome"] for attempt in records] == ["retry", "failed"]
    output = cluster.pocl("status", "--run-dir", str(run)).stdout
    assert "the same error at the same place as in attempt 1: IndexError: a bug" in output
    rows = {line.split()[0]: line for line in output.splitlines()[1:4]}
    assert (
        "failed" in rows["train"]
        and "cancelled" in rows["evaluate"]
        and "cancelled" in rows["report"]
    )
    assert (
        "since train did not finish" in output
        and "Traceback" not in cluster.pocl("logs", "--run-dir", str(run), "train").stdout[:50]
    )


def test_the_launcher_uses_all_nodes_of_an_allocation(
    cluster: Cluster, undisturbed: Path, folder: Path
) -> None:
    """Inside `salloc`, launch/train.sh spreads the ranks over the nodes."""
    run = planned_copy(undisturbed, folder / "allocated")
    command = [
        "salloc",
        "--nodes=2",
        "--ntasks-per-node=1",
        "bash",
        "launch/train.sh",
        "--ranks",
        "2",
        "train",
    ]
    environment = {
        **cluster.environment,
        "POCL_PYTHON": sys.executable,
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    process = subprocess.run(
        [*command, "--run-dir", str(run)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads((run / "train" / "manifest.json").read_text())["info"]["ranks"] == 2
    assert_equal(run, undisturbed)


@pytest.mark.weekly
def test_several_recipes_are_submitted_as_several_runs(
    cluster: Cluster, recipe: Path, folder: Path
) -> None:
    """All recipes are checked before the first submission; status, cancel and resume accept their
    common folder.
    """
    study, other = folder / "study", folder / "other.yaml"
    other.write_text(
        recipe.read_text()
        .replace("name: tiny", "name: other")
        .replace("strategy: fusion", "strategy: random")
    )
    duplicate = cluster.pocl(
        "submit",
        str(recipe),
        str(recipe),
        "--profile",
        PROFILE,
        "--run-dir",
        str(study),
        check=False,
    )
    assert (
        duplicate.returncode == 2
        and "give each its own name" in duplicate.stderr
        and not study.exists()
    )
    output = cluster.pocl(
        "submit", str(recipe), str(other), "--profile", PROFILE, "--run-dir", str(study)
    ).stdout
    assert output.count("submitted init-student") == 2
    output = cluster.pocl("status", "--run-dir", str(study)).stdout
    assert {"tiny", "other"} < set(output.splitlines()) and output.count("attempt") == 2
    assert (
        len(cluster.pocl("cancel", "--run-dir", str(study)).stdout.partition(";")[0].split(","))
        == 12
    )
    ids = [cluster.job(study / name, "init-student") for name in ("tiny", "other")]
    cluster.until(lambda: all(cluster.state(job) == "CANCELLED" for job in ids), "the cancellation")


def test_an_error_of_the_user_is_not_retried(
    cluster: Cluster, undisturbed: Path, folder: Path
) -> None:
    run = planned_copy(undisturbed, folder / "fault")
    cluster.pocl("submit", "--profile", held_profile(folder), "--run-dir", str(run))
    plan = run / "plan" / "plan.json"  # damaged while the job waits, so that no job repeats it
    plan.write_text("{" * plan.stat().st_size)
    release(cluster, run)
    cluster.until(lambda: cluster.state(cluster.job(run, "train")) == "FAILED", "the failure")
    assert [attempt["outcome"] for attempt in attempts(run, "train")] == ["failed"]
    assert (
        "is damaged (plan.json has another checksum)"
        in cluster.pocl("status", "--run-dir", str(run)).stdout
    )


def test_a_run_on_a_full_disk_fails_and_resumes_later(
    cluster: Cluster, undisturbed: Path, folder: Path
) -> None:
    """Ranks and jobs cannot write why they fail; status still reports it, and no work is lost."""
    disk = BASE / "small"
    run, filler = planned_copy(undisturbed, disk / "run"), disk / "filler"
    fill = (
        f"import shutil; free = shutil.disk_usage({str(disk)!r}).free; "
        f"open({str(filler)!r}, 'wb').write(bytes(free))"
    )
    submit_changed(
        cluster, run, folder, f"if step == 21 and distributed.rank() == 0: exec({fill!r})"
    )
    cluster.until(lambda: cluster.state(cluster.job(run, "train")) == "FAILED", "the failure")
    cluster.until(
        lambda: cluster.state(cluster.job(run, "report")) == "CANCELLED",
        "the cancellation of the others",
    )
    output = cluster.pocl("status", "--run-dir", str(run)).stdout
    assert "full" in output and "since train did not finish" in output, (
        output + cluster.newest_logs()
    )
    filler.unlink()
    cluster.pocl("resume", "--run-dir", str(run))
    release(cluster, run)
    cluster.until(
        lambda: cluster.state(cluster.job(run, "report")) == "COMPLETED", "the resumed run's jobs"
    )
    assert_equal(run, undisturbed)
    shutil.rmtree(run)


def test_an_unfit_node_is_excluded(cluster: Cluster, undisturbed: Path, folder: Path) -> None:
    run = planned_copy(undisturbed, folder / "unfit")
    cluster.pocl("submit", "--profile", held_profile(folder), "--run-dir", str(run))
    original_job = cluster.job(run, "train")
    cluster.script("hide", "n2", str(run))
    try:
        release(cluster, run)
        cluster.until(lambda: cluster.job(run, "train") != original_job, "another job in its place")
        release(cluster, run)
        cluster.until(lambda: (run / "train" / "manifest.json").is_file(), "the end of training")
        records = attempts(run, "train")
        assert records[0]["unfit_nodes"] == ["n2"] and "n2" in records[0]["reason"]
        assert sorted(records[1]["nodes"]) == ["n1", "n3"]
        cluster.until(
            lambda: cluster.state(cluster.job(run, "evaluate")) in ("RUNNING", "COMPLETED"),
            "the job that waited for both",
        )
    finally:
        cluster.script("show", "n2", str(run))
        cluster.pocl("cancel", "--run-dir", str(run))
    assert_equal(run, undisturbed)


def python_for_nobody(cluster: Cluster) -> tuple[str, dict[str, str]]:
    """An interpreter that user `nobody` may run with these packages, and its environment; skips the
    test without one.
    """
    packages = f"{ROOT}:{sysconfig.get_path('purelib')}"
    # root's own PATH may have folders that only root may enter.
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
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
        full_environment = {
            **cluster.environment,
            **environment,
            "DS_ACCELERATOR": "cpu",
            "HOME": "/nonexistent",
        }
        if (
            subprocess.run(command, cwd=ROOT, env=full_environment, capture_output=True).returncode
            == 0
        ):
            return python, environment
    pytest.skip("user nobody can run no Python with these packages: only root may read them")


@pytest.mark.weekly
def test_two_runs_of_two_users_at_the_same_time(
    cluster: Cluster, undisturbed: Path, folder: Path
) -> None:
    python, environment = python_for_nobody(cluster)
    home = folder / "home"
    home.mkdir()
    home.chmod(0o777)
    runs = [planned_copy(undisturbed, folder / "twin"), planned_copy(undisturbed, home / "twin")]
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
        assert_equal(run, undisturbed)
    starts = [attempts(run, "train")[0] for run in runs]
    assert starts[0]["start"] < starts[1]["end"] and starts[1]["start"] < starts[0]["end"], (
        "they ran at the same time"
    )
    assert (runs[1] / "train" / "manifest.json").owner() == "nobody"
    for run in runs:
        cluster.pocl("cancel", "--run-dir", str(run))


@pytest.mark.weekly
def test_a_study_submits_waiting_cells_on_the_next_call(
    cluster: Cluster, recipe: Path, folder: Path
) -> None:
    """Two rankings of the same scores: the second cell waits for the scores, reuses them, and
    submits the rest.
    """
    study, runs = folder / "orders.yaml", folder / "orders"
    arms = {"paper": [], "close": ["ranking.k=1"]}
    study.write_text(
        yaml.safe_dump(
            {"name": "orders", "base": str(recipe), "arms": arms, "until": "rank"}, sort_keys=False
        )
    )
    command = ("study", str(study), "--run-dir", str(runs), "--profile", PROFILE)
    output = cluster.pocl(*command).stdout
    assert (
        "paper-seed42: init-student, score, plan" in output and "submitted 1 of 2 cells" in output
    )
    cluster.until(
        lambda: (runs / "paper-seed42" / "ranking" / "manifest.json").is_file(), "the first ranking"
    )
    output = cluster.pocl(*command).stdout
    assert "close-seed42: plan\n" in output and "submitted 1 of 2 cells" in output
    cluster.until(
        lambda: (runs / "close-seed42" / "ranking" / "manifest.json").is_file(),
        "the second ranking",
    )
    output = cluster.pocl(
        *command
    ).stdout  # all cells are finished: the same command shows the tables
    assert "paper-seed42, close-seed42" in output and "submitted" not in output
    assert not (runs / "paper-seed42" / "train").exists()
