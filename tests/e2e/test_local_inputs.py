"""`train.local_copy`: a training that reads copies on the node's disk trains the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from command_line import pocl
from tiny_runs import computed, write_recipe

from pocl_ds.cli.main import main
from pocl_ds.training import run_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local-inputs")
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_models.llama(folder / name, layers=1, seed=seed)
    return folder


def planned_run(folder: Path, name: str) -> Path:
    """A run whose next step is `train`."""
    recipe = write_recipe(
        folder,
        folder / "teacher",
        folder / "student",
        max_train_samples=24,
        ranking={"strategy": "random"},
        train={"batch_size": 8, "micro_batch_size": 2, "lr": 1e-3, "engine": "torch"},
        launch={"ranks": 1, "threads_per_rank": 1},
    )
    for step in ("preprocess", "init-student", "rank", "plan"):
        assert main([step, str(recipe), "--run-dir", str(folder / name)]) == 0
    return folder / name


def final_files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "train" / "final").iterdir()}


def test_a_training_from_copies_has_the_same_weights_and_removes_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = planned_run(folder, "first"), planned_run(folder, "second")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("POCL_SCRATCH", str(folder / "scratch"))
    assert main(["train", "--run-dir", str(first)]) == 0

    build, folders = run_training.build_trainer, list[Any]()

    def recorded(run: Any, training: Any) -> Any:
        folders.extend([run.data, training.student_path, *training.teacher_paths])
        assert all(
            (Path(path).parent.name, Path(path).is_dir()) == ("me", True) for path in folders
        )
        return build(run, training)

    monkeypatch.setattr(run_training, "build_trainer", recorded)
    option = "train.local_copy=$POCL_SCRATCH/me"
    assert main(["train", "--run-dir", str(second), option]) == 0
    names = [Path(path).name.partition("-")[0] for path in folders]
    assert names == ["data", "model", "model"] and len(set(folders)) == 3
    assert computed(second) == computed(first) and final_files(second) == final_files(first)
    assert list((folder / "scratch" / "me").iterdir()) == []


def test_a_variable_that_is_not_set_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = planned_run(folder, "third")
    monkeypatch.setenv("RANK", "0")
    capfd.readouterr()
    assert main(["train", "--run-dir", str(run), "train.local_copy=$NO_SUCH/me"]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "train.local_copy=$NO_SUCH/me: $NO_SUCH is not set on" in error


@pytest.mark.weekly
def test_one_rank_of_a_node_copies(folder: Path, tmp_path: Path) -> None:
    run = planned_run(folder, "two-ranks")
    process = pocl(
        "run",
        "--run-dir",
        str(run),
        "--until",
        "train",
        "launch.ranks=2",
        "train.micro_batch_size=2",
        "train.engine=deepspeed",
        f"train.local_copy={tmp_path}",
    )
    assert process.returncode == 0, process.stderr[-3000:]
    logs = "".join(path.read_text() for path in (run / "logs").glob("*rank*"))
    assert (process.stdout + process.stderr).count(": copied ") == 3 and ": copied " not in logs
    assert list(tmp_path.iterdir()) == []
