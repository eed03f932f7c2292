"""Submissions: scripts whose values are quoted, and the order of SLURM's commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocl_ds.cluster import scheduler
from pocl_ds.cluster.profile import check_profile
from pocl_ds.cluster.srun import srun_command
from pocl_ds.cluster.submit import Submission, resume
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import ArtifactError, RecipeError, ResourceError
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import STEP_NAMES


def submission(run: Path, **profile: Any) -> Submission:
    recipe = check_recipe(
        {
            "name": "x",
            "teacher": {"model": "t"},
            "data": {"source": "documentation"},
            "student": {"model": "s"},
            "launch": {"ranks": 2},
            "score": {"shards": 3},
            "train": {"batch_size": 8, "micro_batch_size": 1},
        }
    )
    fields = {"name": "here", "cpus_per_node": 8, "ranks_per_node": 1, **profile}
    return Submission(RunDirectory(run), recipe, check_profile(fields, "here"), nodes=None)


def scripts(submitted: Submission) -> dict[str, str]:
    return {job.name: submitted.script(job) for job in submitted.jobs}


CHARACTERS = st.characters(
    blacklist_characters='%"\\/', blacklist_categories=("Cs", "Cc", "Zl", "Zp")
)
SPECIAL = st.text(CHARACTERS, min_size=1, max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    name=SPECIAL,
    value=st.text(
        st.characters(blacklist_characters="\0\r", blacklist_categories=("Cs",)), max_size=20
    ),
)
def test_names_and_values_are_quoted(name: str, value: str, tmp_path: Path) -> None:
    """bash reads each value as one word."""
    run = tmp_path / f"r{name}"
    text = scripts(submission(run, environment={"VALUE": value}))["train"]
    line = next(line for line in text.splitlines() if "pocl_ds.cluster.job_runner" in line)
    assert shlex.split(line.removesuffix("&"))[-2:] == [str(run.resolve()), "train"]
    export = text[text.index("export VALUE=") : text.index("# SLURM signals")]
    process = subprocess.run(
        ["bash", "-c", f'{export}\nprintf %s "$VALUE"'], capture_output=True, cwd=tmp_path
    )
    assert process.stdout.decode() == value


def test_options_come_before_the_first_command(tmp_path: Path) -> None:
    text = scripts(
        submission(
            tmp_path / "a b; touch x",
            partition="p",
            account="acc",
            qos="q",
            memory="10G",
            constraint="a&b",
            time="1-00:00:00",
            options=["--mail-type=END"],
            network={"interface": "ib0", "ib_hca": "^mlx5_2", "extra": {"NCCL_IB_TC": "106"}},
            scratch="/scratch/$USER",
            setup=["module load cuda"],
            array_tasks=2,
            jobs={"score": {"partition": "small", "time": "30"}},
        )
    )
    train = text["train"].splitlines()
    options = [line.removeprefix("#SBATCH ") for line in train if line.startswith("#SBATCH")]
    first_command = next(
        number for number, line in enumerate(train) if line and not line.startswith("#")
    )
    assert not any(line.startswith("#SBATCH") for line in train[first_command:]), (
        "sbatch ignores options after a command"
    )
    for option in (
        "--partition=p",
        "--account=acc",
        "--qos=q",
        "--mem=10G",
        "--constraint=a&b",
        "--time=1-00:00:00",
        "--requeue",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=8",
        "--mail-type=END",
        "--signal=B:USR2@120",
        f'--output="{tmp_path}/a b; touch x/logs/train-%j.log"',
    ):
        assert option in options, option
    assert (
        "module load cuda" in train
        and "export NCCL_SOCKET_IFNAME=ib0" in train
        and "export GLOO_SOCKET_IFNAME=ib0" in train
        and "export NCCL_IB_HCA='^mlx5_2'" in train
        and "export NCCL_IB_TC=106" in train
        and 'export TMPDIR="/scratch/$USER"' in train
    )
    score = [line for line in text["score"].splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --partition=small", "#SBATCH --time=30", "#SBATCH --array=0-2%2"} <= set(score)
    assert "#SBATCH --mem=10240M" in score  # all cores of a node, and so all of that memory


def test_a_failing_line_of_the_setup_is_reported(tmp_path: Path) -> None:
    """Failing conditions are not reported."""
    lines = [
        "module() { return 3; }",
        "if false; then",
        "true",
        "fi",
        "false || VALUE=here",
        "module load cuda",
        "export VALUE",
    ]
    text = scripts(submission(tmp_path / "run", setup=lines))["train"]
    script = tmp_path / "script"
    script.write_text(f'{text[: text.index("# SLURM signals")]}\nfalse\nprintf %s "$VALUE"')
    process = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert (
        process.stderr == "pocl: setup: exit code 3 of: module load cuda; the job continues\n"
        and process.stdout == "here"
    )


def test_scripts_have_no_hyper_parameters(tmp_path: Path) -> None:
    for text in scripts(submission(tmp_path / "run")).values():
        assert not re.search(r"\blr\b|batch_|epoch|temperature\b|train\.[a-z]|loss", text)


def test_gpus_are_requested_by_either_option(tmp_path: Path) -> None:
    fields = {"gpus_per_node": 2, "gpu_type": "h100", "ranks_per_node": 2}
    assert (
        "#SBATCH --gpus-per-node=h100:2" in scripts(submission(tmp_path / "run", **fields))["train"]
    )
    by_gres = scripts(submission(tmp_path / "run", gres=True, **fields))["train"]
    assert "#SBATCH --gres=gpu:h100:2" in by_gres and "--gpus-per-node" not in by_gres


def test_shellcheck_accepts_the_scripts(tmp_path: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (launch/setup.sh --dev installs it)")
    for name, text in scripts(
        submission(tmp_path / "a b", environment={"A": "it's"}, setup=["module load x"])
    ).items():
        path = tmp_path / f"{name}.sh"
        path.write_text(text)
        process = subprocess.run([checker, str(path)], capture_output=True, text=True)
        assert process.returncode == 0, process.stdout


def test_a_run_directory_with_special_characters_is_refused(tmp_path: Path) -> None:
    for name in ("50%", 'say "x"', "back\\slash", "two\nlines"):
        with pytest.raises(RecipeError, match="choose another --run-dir"):
            submission(tmp_path / name)


def test_the_batch_size_must_divide_by_the_ranks(tmp_path: Path) -> None:
    submitted = submission(tmp_path / "run")
    with pytest.raises(
        RecipeError, match="train.batch_size=8 is not a multiple of .* x launch.ranks=3"
    ):
        Submission(submitted.run, submitted.recipe, submitted.profile, nodes=3)


def test_the_teachers_ranks_are_part_of_the_jobs_nodes(tmp_path: Path) -> None:
    submitted = submission(tmp_path / "run")
    own = {"placement": "own_ranks", "ranks": 2}
    tree = submitted.recipe.model_dump(mode="json")
    recipe = check_recipe({**tree, "teacher": {**tree["teacher"], **own}})
    nodes = {"run": submitted.run, "recipe": recipe, "profile": submitted.profile}
    four = Submission(**nodes, nodes=None)
    assert four.recipe.launch.ranks == 2
    six = Submission(**nodes, nodes=6)
    assert (six.recipe.launch.ranks, six.recipe.teacher_ranks) == (4, 2)
    lines = {line.split()[0]: line for line in six.show().splitlines()}
    assert "nodes 6 x tasks 1, 2 of them for the teacher" in lines["train"]
    assert "for the teacher" not in lines["score"]
    with pytest.raises(RecipeError, match=r"teacher.ranks=2 leaves no rank for the student on 2 x"):
        Submission(**nodes, nodes=2)


def test_a_run_without_a_submission_raises(tmp_path: Path) -> None:
    from pocl_ds.cluster.status import status

    for function in (status, resume):
        with pytest.raises(ArtifactError, match="was never submitted"):
            function(RunDirectory(tmp_path))


@pytest.mark.parametrize(
    ("container", "words"),
    [
        (
            {"runtime": "pyxis", "image": "a.sqsh", "mounts": ("/data:/data",), "python": "python"},
            [
                "--container-image=a.sqsh",
                "--container-name=pocl-47",
                "--container-mounts=/run:/run,/here:/here,/data:/data",
                "--container-workdir=/here",
            ],
        ),
        (
            {"runtime": "apptainer", "image": "a.sif", "mounts": (), "python": "python"},
            [
                "apptainer",
                "exec",
                "--nv",
                "--bind",
                "/run:/run",
                "--bind",
                "/here:/here",
                "--pwd",
                "/here",
                "a.sif",
            ],
        ),
        (
            {"runtime": "singularity", "image": "a.sif", "mounts": ("/a:/b:ro",), "python": "p"},
            [
                *("singularity", "exec", "--nv", "--bind", "/run:/run", "--bind", "/here:/here"),
                *("--bind", "/a:/b:ro", "--pwd", "/here", "a.sif"),
            ],
        ),
        (None, []),
    ],
)
def test_srun_in_a_container(
    container: Any, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pocl_ds.cluster.scheduler.call",
        lambda *_: "TaskPlugin              = task/affinity,task/cgroup",
    )
    monkeypatch.setattr("os.getcwd", lambda: "/here")
    monkeypatch.setenv("SLURM_JOB_ID", "47")
    spec = {
        "cpus_per_task": 4,
        "container": container,
        "gpus_per_node": 4,
        "gpu_vendor": "nvidia",
    }
    command = srun_command(spec, Path("/run"), 2, 4, "/run/logs/x-%t.log")
    on_amd = srun_command({**spec, "gpu_vendor": "amd"}, Path("/run"), 2, 4, "/run/logs/x-%t.log")
    assert on_amd == ["--rocm" if word == "--nv" else word for word in command]
    assert command[:5] == [
        "srun",
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--cpus-per-task=4",
    ]
    assert (
        "--cpu-bind=cores" in command
        and "--kill-on-bad-exit=1" in command
        and "--export=ALL" in command
    )
    assert command[len(command) - len(words) :] == words


def test_a_resumed_run_stops_at_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study's cell that only ranks must not train after a restart."""
    run, recipe = RunDirectory(tmp_path / "run"), submission(tmp_path / "x").recipe
    submitted = Submission(
        run,
        recipe,
        check_profile({"name": "here", "cpus_per_node": 8}, "here"),
        nodes=1,
        until="rank",
    )
    monkeypatch.setattr(scheduler, "live_jobs", lambda ids: [])
    monkeypatch.setattr(scheduler, "submit", lambda script, options: "7")
    monkeypatch.setattr(scheduler, "release", lambda ids: None)
    monkeypatch.chdir(tmp_path)
    submitted.submit()
    assert [job.name for job in resume(run).jobs] == [
        job.name for job in submitted.jobs
    ] and "train" not in submitted.show()


def test_a_run_is_submitted_from_a_step_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps before must be finished."""
    first = submission(tmp_path / "run")
    arguments = {"run": first.run, "recipe": first.recipe, "profile": first.profile}
    with pytest.raises(ArtifactError, match="the step preprocess, which comes before score, is"):
        Submission(**arguments, nodes=None, start="score")
    done = {"preprocess", "init-student", "score", "rank"}
    finished = {name: name in done for name in STEP_NAMES}
    monkeypatch.setattr("pocl_ds.cluster.submit.finished_steps", lambda *_: finished)
    first.run.path.mkdir()
    first.run.recipe.touch()
    submitted = Submission(**arguments, nodes=None, start="plan", until="plan")
    assert [job.name for job in submitted.jobs] == ["plan"]
    with pytest.raises(ArtifactError, match="the step plan, which comes before train, is not"):
        Submission(**arguments, nodes=None, start="train")
    with pytest.raises(RecipeError, match="--until plan comes before --from train, so no step is"):
        Submission(**arguments, nodes=None, start="train", until="plan")
    # generate-teacher is not finished, but this recipe does not use it.
    assert Submission(**arguments, nodes=None, start="score").jobs[0].name == "plan"


def test_srun_starts_while_the_controller_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_unreachable(*_: str) -> str:
        raise ResourceError("scontrol failed (Unable to contact slurm controller)")

    monkeypatch.setattr("pocl_ds.cluster.scheduler.call", raise_unreachable)
    spec = {"cpus_per_task": 4, "container": None, "gpus_per_node": 0}
    assert not any(
        "--cpu-bind" in word
        for word in srun_command(spec, Path("/run"), 2, 4, "/run/logs/x-%t.log")
    )


def test_a_command_is_retried_while_the_controller_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps: list[float] = []
    monkeypatch.setattr(scheduler.time, "sleep", sleeps.append)
    answers = ["Unable to contact slurm controller", "Socket timed out", ""]

    def command() -> str:
        if message := answers.pop(0):
            raise ResourceError(f"scontrol failed ({message})")
        return "7"

    assert scheduler.retry_while_unreachable(command) == "7" and sleeps == [5, 10]
    answers[:] = ["Invalid qos"]
    with pytest.raises(ResourceError, match="Invalid qos"):
        scheduler.retry_while_unreachable(command)
    assert len(sleeps) == 2


def test_a_submission_inside_a_job_hides_that_jobs_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory per core and memory per node exclude each other, and the task number is wrong."""
    (tmp_path / "sbatch").write_text(
        '#!/bin/sh\necho "Welcome to the cluster"\necho "$SLURM_CONF$SLURM_ARRAY_TASK_ID;north"\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    monkeypatch.setenv("SLURM_CONF", "9")
    assert scheduler.submit("x.sbatch", []) == "9"
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    with pytest.raises(ResourceError, match="printed no job id"):
        scheduler.submit("x.sbatch", [])


def test_a_refused_job_cancels_the_ones_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = submission(tmp_path / "run")
    sent: list[str] = []
    cancelled: list[list[str]] = []

    def submit(script: str, options: list[str]) -> str:
        if len(sent) == 2:
            raise ResourceError("sbatch failed (Invalid qos)")
        sent.append(f"{40 + len(sent)}")
        return sent[-1]

    monkeypatch.setattr(scheduler, "live_jobs", lambda ids: [])
    monkeypatch.setattr(scheduler, "submit", submit)
    monkeypatch.setattr(scheduler, "release", lambda ids: pytest.fail("nothing may start"))
    monkeypatch.setattr(scheduler, "cancel", cancelled.append)
    with pytest.raises(ResourceError, match="Invalid qos"):
        submitted.submit()
    assert len(submitted.jobs) > 2 and cancelled == [["40", "41"]]


def test_only_jobs_without_dependencies_have_a_start_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queried: list[str] = []
    monkeypatch.setattr(scheduler, "start_time", lambda text: queried.append(text) or "tomorrow")
    submitted = submission(tmp_path / "run")
    times = submitted.start_times()
    independent = [job for job in submitted.jobs if not job.after]
    assert queried == [submitted.script(job) for job in independent]
    assert {times[job.name] for job in independent} == {"tomorrow"}
    assert all(
        times[job.name] == f"after {', '.join(job.after)}" for job in submitted.jobs if job.after
    )
