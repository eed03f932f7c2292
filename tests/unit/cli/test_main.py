"""What a command line is made into: which processes are started, with which part of the work."""

from __future__ import annotations

import fcntl
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
from refusals import own_signals, sentence

from pocl_ds.cli.main import main
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.workflow import pipeline
from pocl_ds.workflow.run_dir import RunDirectory


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: x\nteacher: {model: t, mode: cached_hidden_states}\nstudent: {model: s}\n"
    )
    return path


def test_one_shard_of_teach_stays_one_shard(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks are processes of their own, which must hear of it; and shards run side by side, so
    none holds the run.
    """
    started: list[list[str]] = []
    monkeypatch.setattr(pipeline, "call", lambda command, lock=None: started.append(command) or 0)
    run = tmp_path / "run"
    for shard in ("0/4", "1/4"):
        with (run / ".lock").open("w") if run.exists() else nullcontext() as another, own_signals():
            if another:
                fcntl.flock(another, fcntl.LOCK_EX)
            assert (
                main(["cache-teacher", str(recipe), "--run-dir", str(run), "--shard", shard]) == 0
            )
    command = started[1]
    assert command[-5:] == ["cache-teacher", "--run-dir", str(run), "--shard", "1/4"]
    assert "shards: 4" in (run / "recipe.yaml").read_text()


def test_what_others_are_reading_is_not_changed(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The recipe of a run that another process is at: a stage beside it must have the same."""
    monkeypatch.setattr(pipeline, "SETTLE", 0.1)
    run = RunDirectory(tmp_path / "run")
    pipeline.enter(run, load_recipe(str(recipe)))
    before = run.recipe.read_text()
    with (run.path / ".lock").open("w") as another:
        fcntl.flock(another, fcntl.LOCK_SH)  # as jobs do
        said = sentence(capsys, "plan", recipe, "--run-dir", run.path, "train.lr=0.5")
        assert "is in use by another pocl process" in said and run.recipe.read_text() == before
        assert "order.npy" in sentence(
            capsys, "plan", recipe, "--run-dir", run.path
        )  # comes in, and misses the stages before


def test_a_whole_run_is_not_one_of_many_ranks(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As where a cluster's operator sets RANK for every container."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    said = sentence(capsys, "run", recipe, "--run-dir", tmp_path / "run")
    assert (
        said
        == "RANK=0 makes this process one of several ranks, which `pocl run` starts itself: unset "
        "RANK and WORLD_SIZE"
    )
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_what_would_run_and_does_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with own_signals():
        assert (
            main(
                [
                    "run",
                    str(recipe),
                    "--run-dir",
                    str(run),
                    "--dry-run",
                    "--until",
                    "train",
                    "launch.ranks=2",
                ]
            )
            == 0
        )
        said = capsys.readouterr().out
        assert main(["score", str(recipe), "--run-dir", str(run), "--dry-run"]) == 0
    text, _, stages = said.partition(f"\nrun directory: {run}\n")
    assert "ranks: 2" in text and not run.exists()
    assert [" ".join(line.split()) for line in stages.splitlines()] == [
        "data would run",
        "prepare would run",
        "teach would run on 2 ranks",
        "score would run",
        "rank would run",
        "plan would run",
        "train would run on 2 ranks",
    ]
    assert capsys.readouterr().out.endswith(f"\nrun directory: {run}\nscore      would run\n")


def test_what_no_command_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with own_signals():
        assert main(["run", "quickstart", "--ranking", "3"]) == 2
        assert main(["bench", "list"]) == 0
    found = capsys.readouterr()
    assert (
        "unrecognized arguments" in found.err
        and "(pocl run --help)" in found.err
        and "rouge" in found.out
    )
    assert "there is no benchmark 'speed': take one of" in sentence(capsys, "bench", "speed")


def test_ctrl_c_while_the_command_line_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pocl_ds.cli.main._parser", lambda: os.kill(os.getpid(), signal.SIGINT))
    with own_signals():
        assert main(["run", "quickstart"]) == 130
    assert (
        capsys.readouterr().err
        == "pocl: interrupted; finished work is kept, the same command goes on\n"
    )
