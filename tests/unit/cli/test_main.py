"""What a command line does: which processes it starts, for which part of the work, and what it
refuses.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from refusals import error_message, restored_signals

from pocl_ds.cli.main import main
from pocl_ds.cli.pipeline import show_results
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.workflow import pipeline, run_setup
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.run_dir import RunDirectory


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: x\ndata: {source: documentation}\n"
        "teacher: {model: t, mode: cached_hidden_states}\nstudent: {model: s}\n"
    )
    return path


def test_one_shard_of_cache_teacher_stays_one_shard(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks run in separate processes, which receive the shard. Shards run concurrently, so
    they share the run directory.
    """
    started: list[list[str]] = []
    monkeypatch.setattr(pipeline, "run_process", lambda command: started.append(command) or 0)
    run = tmp_path / "run"
    for shard in ("0/4", "1/4"):
        lock = (run / ".lock").open("w") if run.exists() else nullcontext()
        with lock as handle, restored_signals():
            if handle:
                fcntl.flock(handle, fcntl.LOCK_SH)
            assert (
                main(["cache-teacher", str(recipe), "--run-dir", str(run), "--shard", shard]) == 0
            )
    command = started[1]
    assert command[-5:] == ["cache-teacher", "--run-dir", str(run), "--shard", "1/4"]
    assert "shards: 4" in (run / "recipe.yaml").read_text()


def test_the_recipe_of_a_locked_run_does_not_change(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A step that runs next to another process of the same run must have the same recipe."""
    monkeypatch.setattr(run_setup, "LOCK_WAIT_SECONDS", 0.1)
    run = RunDirectory(tmp_path / "run")
    run_setup.open_run_directory(run, load_recipe(str(recipe)))
    before = run.recipe.read_text()
    with (run.path / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)  # as jobs do
        message = error_message(capsys, "plan", recipe, "--run-dir", run.path, "train.lr=0.5")
        assert "is in use by another pocl process" in message and run.recipe.read_text() == before
        # The same recipe is accepted; then the results of earlier steps are missing.
        assert "order.npy" in error_message(capsys, "plan", recipe, "--run-dir", run.path)


def test_pocl_run_refuses_the_environment_of_a_rank(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Some clusters set RANK in every container."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    message = error_message(capsys, "run", recipe, "--run-dir", tmp_path / "run")
    assert (
        message
        == "RANK=0 makes this process one of several ranks, which `pocl run` starts itself: unset "
        "RANK and WORLD_SIZE"
    )
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_what_would_run_and_does_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    # An override may appear anywhere.
    words = ["launch.ranks=2", str(recipe), "--run-dir", str(run), "--dry-run"]
    with restored_signals():
        assert main(["run", *words, "--until", "train"]) == 0
        output = capsys.readouterr().out
        assert main(["score", str(recipe), "--run-dir", str(run), "--dry-run"]) == 0
    text, _, steps = output.partition(f"\nrun directory: {run}\n")
    assert "ranks: 2" in text and not run.exists()
    assert [" ".join(line.split()) for line in steps.splitlines()] == [
        "preprocess would run",
        "init-student would run",
        "score would run",
        "rank would run",
        "plan would run",
        "cache-teacher would run on 2 ranks",
        "train would run on 2 ranks",
    ]
    assert capsys.readouterr().out.endswith(
        f"\nrun directory: {run}\nscore             would run\n"
    )


# Command line -> error message.
ERRORS = {
    "run quickstart --ranking 3": "there is no option --ranking: did you mean --ranks? "
    "(pocl run --help)",
    "run quickstart --ranks two": "invalid value for '--ranks': ",
    "run quickstart quickstart2": "found two recipes (quickstart, quickstart2): give one; "
    "overrides have the form field=value",
    "run": "there is no recipe: name a file or a shipped recipe (pocl run quickstart), or a "
    "--run-dir that holds a recipe.yaml",
    "run quickstart --until trian": "--until trian: there is no such step: did you mean train?",
    "run quickstart train.lrr=1": "recipe field train.lrr does not exist: did you mean lr?",
    "score quickstart --shard 4/4": "--shard 4/4: write I/N with I from 0 to N-1, for example 2/8",
    "evaluate quickstart --seed 1": "--seed selects part of one model's answers: add --model",
    "evaluate quickstart --model teacher,studnet": "--model studnet: there is no such model: did "
    "you mean student?",
    "compare --run-dir a --models studnet teacher": "--models studnet: there is no such model: "
    "did you mean student?",
    "compare runs/a runs/b": "missing option '--run-dir' (pocl compare --help)",
    "status --run-dir": "option '--run-dir' requires an argument (pocl status --help)",
    "bench stepp": "there is no benchmark 'stepp': did you mean step?",
    "profile": "missing command (pocl profile --help)",
}


@pytest.mark.parametrize("line", ERRORS)
def test_a_wrong_command_line_is_one_sentence(
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_message(capsys, *line.split()).startswith(ERRORS[line])
    assert ERRORS[line].endswith(" ") or list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "remedy"), [("trian", "did you mean train?"), ("qqqqq", "use one of run, prep")]
)
def test_an_unknown_command(word: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with restored_signals():
        assert main([word]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pocl: there is no command {word!r}: {remedy}")
    assert error.count("\n") == 1 and error.endswith(" (pocl --help)\n")


def test_ctrl_c_while_the_command_line_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "pocl_ds.cli.main._command_group", lambda: os.kill(os.getpid(), signal.SIGINT)
    )
    with restored_signals():
        assert main(["run", "quickstart"]) == 130
    assert (
        capsys.readouterr().err
        == "pocl: interrupted; finished work is saved; run the same command again to continue\n"
    )


def test_closed_output_pipe_is_no_error() -> None:
    """`pocl show quickstart | head -1`."""
    line = f"{sys.executable} -m pocl_ds.cli.main show quickstart | true"
    result = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.stderr == ""


def test_results_are_a_table_with_footnotes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"rouge_l": 14.2, "rouge_l_deviation": 0.5}
    models = {
        "initial": {"loss": 8.5149, "benchmarks": {}},
        "student": {"loss": 4.25, "kl": 0.8, "benchmarks": {"test": scores}},
    }
    run = RunDirectory(tmp_path)
    write_json(
        run.evaluation / "results.json",
        {"models": models, "footnotes": {"test": ["2 prompts cut"]}},
    )
    show_results(run)
    header, initial, student, *footer = capsys.readouterr().out.lstrip("\n").splitlines()
    assert header.split("  ")[-1] == "ROUGE-L test ⚠"
    assert initial.split() == ["student", "before", "8.515", "–", "–"]
    assert student.split() == ["student", "after", "4.250", "0.800", "14.20", "±", "0.50"]
    assert len(header) == len(initial) == len(student)
    assert footer == [
        "",
        "⚠ test: 2 prompts cut",
        "",
        f"student  {run.export}",
        f"report   {run.report / 'report.html'}",
    ]


def test_a_division_into_too_many_shards_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in ("score", "cache-teacher", "evaluate"):
        words = ("--run-dir", tmp_path / "run", "--shard", "0/99999999")
        message = error_message(capsys, step, recipe, *words)
        assert message == "--shard 0/99999999: a step has at most 10000 shards"
