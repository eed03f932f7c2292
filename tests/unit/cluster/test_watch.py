"""`pocl watch`: what it shows of a run's directory."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import write_recipe

from pocl_ds.cli.main import main
from pocl_ds.cluster.watch import BLOCKS, read_view, render, sparkline
from pocl_ds.config.recipe_file import dump_recipe, load_recipe
from pocl_ds.runtime.logs import log_to_file, setup_logging
from pocl_ds.runtime.progress import Progress
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.steps import fingerprints


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run whose data are finished and whose student is being prepared."""
    recipe = load_recipe(
        str(
            write_recipe(tmp_path, tmp_path / "teacher", tmp_path / "student", max_train_samples=40)
        )
    )
    run = RunDirectory(tmp_path / "run")
    run.data.mkdir(parents=True)
    run.recipe.write_text(dump_recipe(recipe))
    write_manifest(run.data, "preprocess", fingerprints(recipe)["preprocess"], info={})
    run.logs.mkdir()
    (run.logs / "init-student.log").write_text(
        "2026-01-01 10:00:00 INFO loading\n2026-01-01 10:00:01 WARNING a word of warning\n"
    )
    return run


def write_training(run: RunDirectory, steps: int) -> None:
    run.plan.mkdir()
    (run.plan / "plan.json").write_text(json.dumps({"stages": [{"steps": 10}, {"steps": 20}]}))
    run.train.mkdir()
    with (run.train / "metrics.jsonl").open("w") as stream:
        for step in range(1, steps + 1):
            record = {
                "kind": "step",
                "step": step,
                "stage": int(step > 10),
                "loss": 3.0 / step,
                "kd_loss": 1.0 / step,
                "sft_loss": 2.0,
                "temperature": 1.0,
                "sft_ratio": 0.3,
                "lr": 1e-4,
                "grad_norm": 0.5,
                "seconds": 2.0,
                "data_seconds": 0.0,
                "teacher_seconds": 0.5,
                "student_seconds": 1.0,
                "optimizer_seconds": 0.2,
                "wait_seconds": 0.3,
                "mfu": 0.4,
                "load_imbalance": 1.25,
                "tokens_per_second": 100.0,
                "memory_gib": 1.5,
                "gpu_busy": 80.0,
                "rollout_share": 0.25,
            }
            stream.write(json.dumps(record) + "\n")
        stream.write('{"kind": "step", "st')  # being written
    (run.train / "checkpoints" / "step-00000010").mkdir(parents=True)


def test_a_run_at_its_start(run: RunDirectory) -> None:
    os.utime(run.logs / "init-student.log", (time.time() - 300,) * 2)
    text = render(read_view(run), 200)
    assert "✓ preprocess  ▸ init-student" in text and "· train" in text
    assert "2026-01-01 10:00:01 WARNING a word of warning  (silent for 5 min 0" in text
    assert "10:00:01  a word of warning" in text and "loading" not in text.splitlines()[-1]


def test_a_training_shows_rate_curves_and_resources(run: RunDirectory) -> None:
    write_training(run, 15)
    view = read_view(run)
    text = render(view, 100)
    assert "train: step 15/30, stage 2/2, 2.00 s a step, 100 tokens/s, 30 s left" in text
    parts = "data 0%, teacher 25%, student 50%, optimizer 10%, wait 15%"
    assert f"of a step: {parts}, MFU 40%, load imbalance 1.25" in text
    assert "memory 1.5 GiB (rank 0), GPU 80% busy, generation 25% of a step" in text
    assert "loss        0.2000  █" in text and "checkpoint step-00000010" in text
    assert not view.finished
    assert all(len(line) <= 40 for line in render(view, 40).splitlines())


def test_the_command_draws_once_without_a_terminal(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", "--run-dir", str(run.path)]) == 0
    assert "▸ init-student" in capsys.readouterr().out
    assert main(["watch", "--run-dir", str(run.path / "data")]) == 2
    assert "holds no recipe.yaml: give the directory of a run" in capsys.readouterr().err


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=50),
    st.integers(1, 20),
)
def test_a_sparkline_fits_and_spans_its_values(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    finite = [value for value in values if abs(value) < float("inf")]
    assert len(line) == min(width, len(finite)) and set(line) <= set(BLOCKS)
    if len(set(finite)) > 1 and len(finite) <= width:
        assert BLOCKS[0] in line and BLOCKS[-1] in line


def test_progress_on_a_terminal_is_kept_in_the_log_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_logging()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    monkeypatch.setattr("sys.stderr.fileno", lambda: 2)
    path = tmp_path / "logs" / "score.log"
    with log_to_file(path):
        with Progress(2, "samples", "score") as progress:
            progress.last_shown -= 1
            progress.advance(2)
        logging.getLogger("pocl_ds").warning("at last")
    lines = path.read_text().splitlines()
    assert "score  2/2 samples" in lines[0] and lines[-1].endswith("WARNING at last")
