"""What a result depends on; engines side by side: which GPUs each gets, and what becomes of their
exit codes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl_ds.config import Recipe
from pocl_ds.errors import ArtifactError, Interrupted, RecipeError, ResourceError
from pocl_ds.resources import LAUNCHER, module_command
from pocl_ds.workflow.checks import check_sample_counts
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.pipeline import _run_engines
from pocl_ds.workflow.processes import run_process, run_processes
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import lock_run_directory, record_recipe
from pocl_ds.workflow.steps import fingerprints

Calls = list[tuple[list[list[str]], list[dict[str, str]]]]


def recipe(processes: int, tensor_parallel: int = 1) -> Recipe:
    evaluate = {
        "data_parallel_size": processes,
        "generation": {"tensor_parallel_size": tensor_parallel},
        "models": ["student"],
    }
    return Recipe.model_validate(
        {"name": "r", "student": {"model": "m"}, "loss": {"name": "sft"}, "evaluate": evaluate}
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found: Calls = []

    def together(
        commands: list[list[str]], environments: list[dict[str, str]], lock: int | None = None
    ) -> int:
        found.append((commands, environments))
        return 0

    monkeypatch.setattr(pipeline, "run_processes", together)
    return found


def run(asked: Recipe) -> Any:
    return _run_engines(["pocl", "evaluate", "--model", "student"], asked, 3)


@pytest.mark.parametrize("strategy", ["fusion", "random"])
@pytest.mark.parametrize(
    "change",
    [
        {"teacher": {"model": "other"}},
        {"teacher": {"model": "t", "dtype": "bfloat16"}},
        {"student": {"model": "m", "heal_steps": 3}},
    ],
)
def test_what_is_trained_depends_on_the_models_however_samples_are_ordered(
    strategy: str, change: dict[str, Any]
) -> None:
    tree = {
        "name": "r",
        "student": {"model": "m"},
        "teacher": {"model": "t"},
        "ranking": {"strategy": strategy},
        "baseline": {"enabled": True},
    }
    one, other = (fingerprints(Recipe.model_validate({**tree, **extra})) for extra in ({}, change))
    for step in ("init-student", "train", "baseline", "evaluate"):
        assert one[step] != other[step], step


def test_each_engine_has_gpus_of_its_own(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run(recipe(2, 2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a,7")
    run(recipe(3))
    (first, devices), (_, others) = calls
    assert [command[-2:] for command in first] == [["--shard", "0/2"], ["--shard", "1/2"]]
    assert devices == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in others] == ["5", "GPU-a", "7"]
    with pytest.raises(
        RecipeError,
        match=r"evaluate\.data_parallel_size=2 with tensor_parallel_size=2 needs 4 GPUs, and 3 are visible",
    ):
        run(recipe(2, 2))


def test_a_fault_inside_is_not_taken_for_another_process(tmp_path: Path) -> None:
    """A pipe that is full raises BlockingIOError too."""
    with (
        pytest.raises(BlockingIOError, match="a full pipe"),
        lock_run_directory(RunDirectory(tmp_path)),
    ):
        raise BlockingIOError("a full pipe")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre that is mounted without `flock`, NFS whose server keeps no locks."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    found = pytest.raises(
        ResourceError,
        match=r"\.lock cannot be locked \(.+\): its file system is mounted without locks",
    )
    with found, lock_run_directory(RunDirectory(tmp_path)):
        pass


def test_an_evaluation_depends_on_the_files_of_its_benchmarks(tmp_path: Path) -> None:
    """Those of a folder too; one that is not there yet, or that no benchmark names, is none."""
    tree = {"name": "r", "student": {"model": "m"}, "loss": {"name": "sft"}}
    tree["evaluate"] = {
        "models": ["student"],
        "benchmark_dir": str(tmp_path),
        "benchmarks": ["dolly", "vicuna"],
    }
    asked = Recipe.model_validate(tree)
    prints = [fingerprints(asked)["evaluate"]]
    for name, text in (
        ("other.jsonl", "one"),
        ("dolly.jsonl", "one"),
        ("dolly.jsonl", "two"),
        ("dolly.jsonl", "one"),
    ):
        (tmp_path / name).write_text(text)
        prints.append(fingerprints(asked)["evaluate"])
    assert prints[0] == prints[1] and prints[2] == prints[4] and len(set(prints)) == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {
                "policy": {"name": "distillm", "replay_buffer_size": 8},
                "curriculum": {"sft_ratio": [0, 0]},
                "train": {"batch_size": 8, "validate_every_n_steps": 4},
            },
            "policy.name=distillm follows the validation",
        ),
        (
            {"train": {"batch_size": 8, "checkpoint": {"keep_best": True}}},
            "train.checkpoint.keep_best follows the validation loss",
        ),
    ],
)
def test_what_follows_a_validation_loss_needs_samples_for_it(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """A run without them would end well, as plain distillation under another name."""
    run = RunDirectory(tmp_path)
    tree = {
        "name": "r",
        "student": {"model": "m"},
        "teacher": {"model": "t"},
        "train": {"batch_size": 8},
        **fields,
    }
    for samples in (5, 0):
        splits = {"train": {"samples": 64}, "validation": {"samples": samples}}
        write_manifest(run.data, "preprocess", "f", info={"splits": splits}, files=[])
        if samples:
            check_sample_counts(run, Recipe.model_validate(tree))
    with pytest.raises(RecipeError, match=words):
        check_sample_counts(run, Recipe.model_validate(tree))


def test_a_validation_that_never_comes(tmp_path: Path) -> None:
    """Twenty steps: the probability of the student's own responses moves at validations alone."""
    run = RunDirectory(tmp_path)
    write_manifest(
        run.data,
        "preprocess",
        "f",
        info={"splits": {"train": {"samples": 64}, "validation": {"samples": 9}}},
        files=[],
    )
    curriculum = {"num_subsets": 4, "epochs_per_stage": 1, "sft_ratio": [0, 0]}
    for every in (19, 20):
        tree = {
            "name": "r",
            "student": {"model": "m"},
            "teacher": {"model": "t"},
            "policy": {"name": "distillm", "replay_buffer_size": 8},
            "train": {"batch_size": 8, "validate_every_n_steps": every},
            "curriculum": curriculum,
        }
        if every == 19:
            check_sample_counts(run, Recipe.model_validate(tree))
    with pytest.raises(
        RecipeError, match=r"train\.validate_every_n_steps=20 never comes in the 20 optimizer steps"
    ):
        check_sample_counts(run, Recipe.model_validate(tree))


def test_a_warm_up_that_never_ends(tmp_path: Path) -> None:
    """64 samples in four subsets: a first stage of two steps an epoch."""
    run = RunDirectory(tmp_path)
    write_manifest(
        run.data,
        "preprocess",
        "f",
        info={"splits": {"train": {"samples": 64}, "validation": {"samples": 9}}},
        files=[],
    )

    def check(warmup: int, schedule: str) -> None:
        train = {"batch_size": 8, "warmup_steps": warmup, "lr_restart": schedule}
        curriculum = {"num_subsets": 4, "epochs_per_stage": 1}
        tree = {
            "name": "r",
            "student": {"model": "m"},
            "teacher": {"model": "t"},
            "train": train,
            "curriculum": curriculum,
        }
        check_sample_counts(run, Recipe.model_validate(tree))

    check(1, "per_stage")
    check(19, "never")
    with pytest.raises(
        RecipeError, match="train.warmup_steps=2 never ends in the 2 optimizer steps of a stage"
    ):
        check(2, "per_stage")
    with pytest.raises(
        RecipeError, match="train.warmup_steps=20 never ends in the 20 optimizer steps of the run"
    ):
        check(20, "never")


def test_a_tracker_that_is_missing_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tree = {
        "name": "r",
        "student": {"model": "m"},
        "loss": {"name": "sft"},
        "train": {"tracking": {"wandb": True}},
    }
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ResourceError, match=r"train\.tracking\.wandb=true needs the package wandb"):
        record_recipe(run, Recipe.model_validate(tree))
    assert not run.recipe.exists()
    record_recipe(run, Recipe.model_validate({**tree, "train": {}}))


def test_a_place_that_deepspeed_takes_for_a_pattern_is_refused(tmp_path: Path) -> None:
    tree = {"name": "r", "student": {"model": "m"}, "loss": {"name": "sft"}}
    with pytest.raises(ArtifactError, match=r"contains '\\[', which DeepSpeed treats as a pattern"):
        record_recipe(RunDirectory(tmp_path / "run[1]"), Recipe.model_validate(tree))
    assert not (tmp_path / "run[1]").exists()


def test_without_gpus_they_share_the_cores(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    run(recipe(3))
    assert calls[0][1] == [{"OMP_NUM_THREADS": "2"}] * 3


def test_the_first_fault_is_told_when_all_have_ended() -> None:
    commands = [[sys.executable, "-c", f"import sys; sys.exit({code})"] for code in (0, 2, 3)]
    assert run_processes(commands, [{}] * 3) == 2
    assert run_processes(commands[:1] * 2, [{}] * 2) == 0


def test_a_signal_reaches_all() -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('up', flush=True); time.sleep(60)"
    timer = threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    assert run_processes([[sys.executable, "-c", code]] * 2, [{}] * 2) == 75


@pytest.mark.parametrize(
    "code", ["time.sleep(60)", "signal.signal(15, lambda *_: sys.exit(0)); time.sleep(60)"]
)
def test_a_signal_that_no_child_answers_is_ours(code: str) -> None:
    """One that is starting has no handler yet; one at its end is done."""

    class OurHandlerError(Exception):
        pass

    def ours(*_: object) -> None:
        raise OurHandlerError

    before = signal.signal(signal.SIGTERM, ours)
    try:
        timer = threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        timer.start()
        with pytest.raises(OurHandlerError):
            run_processes(
                [[sys.executable, "-c", f"import signal, sys, time; {code}"]] * 2, [{}] * 2
            )
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_further_child_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the one that was started meanwhile gets it."""
    real, begun = subprocess.Popen, []

    def popen(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        child = real(*words, **options)
        begun.append(child)
        os.kill(os.getpid(), signal.SIGINT)
        return child

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        run_processes([["bash", "-c", "sleep 60"]] * 2, [{}] * 2)
    assert [child.returncode for child in begun] == [-signal.SIGINT]


@pytest.mark.parametrize("ranks", [False, True])
def test_ctrl_c_while_python_itself_starts(
    ranks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before any line of ours runs, Python would die of it in its module `site`: with code 1, which
    no shell takes for Ctrl-C.
    """
    slow = "import pathlib, time\npathlib.Path(__file__).with_name('on').touch()\ntime.sleep(2)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["--version"]
    command = (
        ["bash", str(LAUNCHER), "--ranks", "2", *words]
        if ranks
        else [*module_command("pocl_ds.cli.main"), *words]
    )

    def press() -> None:
        while not (tmp_path / "on").exists():
            time.sleep(0.01)
        time.sleep(2.6 if ranks else 0.3)  # the launcher asks Python for a port first
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        run_process(command)
    pressing.join()
    said = capfd.readouterr()
    assert "pocl_ds" not in said.out, "it was asked to stop before it spoke"
    assert ranks or not said.err


def test_a_signal_that_we_ignore_is_ignored_by_children_too() -> None:
    """A shell starts background jobs with Ctrl-C ignored: it ended the step at work, and the run
    with it.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = (
            "import os, signal, sys; os.kill(os.getppid(), 2); os.kill(os.getpid(), 2); sys.exit(5)"
        )
        assert run_process([sys.executable, "-c", code]) == 5
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_killed_child_is_told() -> None:
    with pytest.raises(
        Interrupted, match="ended by SIGKILL, often because memory ran out"
    ) as found:
        run_processes([[sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]], [{}])
    assert found.value.exit_code == 137
