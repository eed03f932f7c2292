"""A complete run of tiny models through the real command line: real ranks, real DeepSpeed, every
workflow step up to the report.

Trainings with other engines, ranks and micro-batches must give the same losses and weights; a
training that is killed and resumed must give exactly the same.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import PLANTED, ROOT, environment, pocl
from safetensors.torch import load_file
from tiny_runs import write_recipe

from pocl_ds.bench import overhead
from pocl_ds.runtime.metrics import read_metrics


def training_steps(run: Path) -> list[dict[str, Any]]:
    fields = (
        "step",
        "stage",
        "epoch",
        "loss",
        "kd_loss",
        "sft_loss",
        "temperature",
        "sft_ratio",
        "lr",
        "loss_tokens",
        "sample_ids_digest",
    )
    return [
        {key: record[key] for key in fields}
        for record in read_metrics(run / "train" / "metrics.jsonl")
    ]


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "train" / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_llama_untied: Path
) -> Path:
    """The run directory of a finished run on two ranks."""
    folder = tmp_path_factory.mktemp("e2e")
    path = write_recipe(
        folder,
        tiny_llama_untied,
        tiny_llama,
        max_train_samples=56,
        student={"prune": {"drop_layers": "1"}, "heal_steps": 2, "dropout": 0.1},
        train={"layout": "packed"},
        evaluate={"seeds": [1, 2]},
    )
    run = folder / "run"
    pocl("run", str(path), "--run-dir", str(run))
    return run


def untrained_copy(run: Path, target: Path) -> Path:
    """The run up to its plan."""
    shutil.copytree(
        run,
        target,
        ignore=shutil.ignore_patterns("train", "evaluation", "export", "report", "logs", ".lock"),
    )
    return target


def test_every_step_writes_its_result(finished: Path) -> None:
    for folder in ("data", "models", "ranking", "plan", "train", "evaluation", "export", "report"):
        assert (finished / folder / "manifest.json").is_file()
    results = json.loads((finished / "evaluation" / "results.json").read_text())["models"]
    assert set(results) == {"teacher", "initial", "student"}
    assert results["teacher"]["kl"] == 0 and results["student"]["kl"] < results["initial"]["kl"]
    records = training_steps(finished)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert [
        s["steps"] for s in json.loads((finished / "plan" / "plan.json").read_text())["stages"]
    ] == [4, 8, 14]
    assert len(records) == 26
    info = json.loads((finished / "train" / "manifest.json").read_text())["info"]
    assert info["packed"] and 0 < info["padding_share"] < 1


def test_no_file_contains_a_secret_of_the_environment(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert (
        len(files) > 50 and [path for path in files if PLANTED.encode() in path.read_bytes()] == []
    )


def test_files_have_the_permissions_of_the_umask(finished: Path) -> None:
    """The tests run `pocl` with umask 022."""
    modes = {path.relative_to(finished): path.stat().st_mode for path in finished.rglob("*")}
    assert [name for name, mode in modes.items() if mode & 0o022 or not mode & 0o040] == []


def test_a_second_run_finds_every_step_finished(finished: Path) -> None:
    before = (finished / "train" / "manifest.json").stat().st_mtime_ns
    process = pocl("run", "--run-dir", str(finished))
    assert process.stderr.count("already finished") == 9
    assert (finished / "train" / "manifest.json").stat().st_mtime_ns == before


def test_a_run_directory_of_another_recipe_is_refused(finished: Path) -> None:
    process = pocl("run", "--run-dir", str(finished), "ranking.k=10", check=False)
    assert (
        process.returncode == 2 and "ranking.k" in process.stderr and "--run-dir" in process.stderr
    )
    assert "Traceback" not in process.stderr


@pytest.fixture(scope="module")
def without_dropout(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without dropout. Dropout masks depend on the rank; without them, every number of ranks
    computes the same.
    """
    folder = tmp_path_factory.mktemp("without-dropout")
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    recipe["student"] |= {
        "heal_steps": 0,
        "prune": None,
        "dropout": 0.0,
        "model": str(finished / "models" / "heal" / "final"),
    }
    recipe["curriculum"] |= {"num_subsets": 2, "epochs_per_stage": 1}
    recipe["train"]["checkpoint"] |= {"every_n_steps": 2, "keep_last": 10}
    path, run = folder / "recipe.yaml", folder / "run"
    path.write_text(yaml.safe_dump(recipe))
    for step in ("preprocess", "init-student", "score", "rank", "plan", "train"):
        pocl(step, str(path), "--run-dir", str(run))
    return run


@pytest.mark.parametrize(
    "change",
    [
        ["train.engine=torch", "launch.ranks=1"],
        pytest.param(["launch.ranks=1", "train.micro_batch_size=8"], marks=pytest.mark.weekly),
        pytest.param(
            ["train.micro_batch_tokens=200", "train.layout=padded"], marks=pytest.mark.weekly
        ),
        ["student.ds_config=student_zero2", "train.layout=padded"],
    ],
)
def test_other_engines_ranks_and_micro_batches_give_the_same_result(
    without_dropout: Path, tmp_path: Path, change: list[str]
) -> None:
    other = untrained_copy(without_dropout, tmp_path / "run")
    pocl("train", "--run-dir", str(other), *change)
    runs = [without_dropout, other]
    for actual, expected in zip(training_steps(runs[0]), training_steps(runs[1]), strict=True):
        assert actual.pop("loss") == pytest.approx(expected.pop("loss"), rel=2e-5)
        assert actual.pop("kd_loss") == pytest.approx(expected.pop("kd_loss"), rel=2e-5)
        assert actual.pop("sft_loss") == pytest.approx(expected.pop("sft_loss"), rel=2e-5)
        assert actual == expected
    actual_weights, expected_weights = weights(runs[0]), weights(runs[1])
    assert actual_weights.keys() == expected_weights.keys()
    assert (
        max(
            float((actual_weights[name] - expected_weights[name]).abs().max())
            for name in actual_weights
        )
        < 2e-4
    )


def test_a_cached_teacher_gives_the_same_training(without_dropout: Path, tmp_path: Path) -> None:
    """Cached hidden states replace the teacher's layers; only a missing shard is written again."""
    run = untrained_copy(without_dropout, tmp_path / "run")
    words = ("--run-dir", str(run), "teacher.mode=cached_hidden_states", "teacher_cache.shards=3")
    missing = pocl("train", *words, check=False)
    assert (
        missing.returncode == 2
        and "run `pocl cache-teacher`" in missing.stderr
        and "Traceback" not in missing.stderr
    )
    pocl("cache-teacher", *words)
    before = {
        path.name: path.stat().st_mtime_ns for path in (run / "teacher_cache").glob("*/*.bin")
    }
    for name in ("manifest.json", "train-00001-of-00003.bin"):
        next((run / "teacher_cache").glob(f"*/{name}")).unlink()
    pocl(
        "cache-teacher",
        "--run-dir",
        str(run),
        "teacher.mode=cached_hidden_states",
        "--shard",
        "1/3",
    )
    after = {path.name: path.stat().st_mtime_ns for path in (run / "teacher_cache").glob("*/*.bin")}
    assert {name for name in before if before[name] != after[name]} == {"train-00001-of-00003.bin"}
    shutil.move(run / "teacher_cache", tmp_path / "teacher_cache")
    shutil.copytree(tmp_path / "teacher_cache", run / "teacher_cache")
    process = pocl("train", *words)
    assert "the teacher's outputs are cached" in process.stderr
    for actual, expected in zip(training_steps(run), training_steps(without_dropout), strict=True):
        for name in ("loss", "kd_loss", "sft_loss"):
            assert actual.pop(name) == pytest.approx(expected.pop(name), rel=2e-6)
        assert actual == expected
    actual_weights, expected_weights = weights(without_dropout), weights(run)
    # Adam turns any gradient into an update of about lr = 1e-3, also one that is a rounding error:
    # a few weights differ by a part of that.
    assert (
        max(
            float((actual_weights[name] - expected_weights[name]).abs().max())
            for name in actual_weights
        )
        < 2e-4
    )

    damaged = untrained_copy(run, tmp_path / "damaged")
    path = next((damaged / "teacher_cache").glob("*/train-00002-of-00003.bin"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    process = pocl("train", "--run-dir", str(damaged), check=False)
    assert (
        process.returncode == 2
        and f"{path} is damaged at row" in process.stderr
        and "Traceback" not in process.stderr
    )
    path.write_bytes(path.read_bytes()[:-4])
    process = pocl("train", "--run-dir", str(damaged), check=False)
    assert (
        process.returncode == 2
        and "is missing or not what `pocl cache-teacher` wrote" in process.stderr
    )


@pytest.mark.parametrize(
    ("mode", "size", "sentence", "name"),
    [
        pytest.param(
            *("cached_topk", "top_k=16", "the top 16 leave out a probability of", "mass"),
            marks=pytest.mark.weekly,
        ),
        ("cached_sampled", "num_samples=64", "64 draws give", "gradient_error"),
    ],
)
def test_a_teacher_cached_as_records(
    without_dropout: Path, tmp_path: Path, mode: str, size: str, sentence: str, name: str
) -> None:
    """A training with records of top-k or sampled logits, which resumes with the same result."""
    run = untrained_copy(without_dropout, tmp_path / "run")
    words = ("--run-dir", str(run), f"teacher.mode={mode}", f"teacher_cache.{size}")
    log = pocl("cache-teacher", *words).stderr
    (manifest,) = (run / "teacher_cache").glob("*/manifest.json")
    info = json.loads(manifest.read_text())["info"]
    assert info["mode"] == mode and sentence in log
    assert [error["temperature"] for error in info["error"]] == [1.0, 2.0]
    assert 0 < info["error"][0][name] < info["error"][1][name] < 1
    pocl("train", *words)
    steps, reference = training_steps(run), training_steps(without_dropout)
    assert len(steps) == len(reference)
    assert steps[0]["sft_loss"] == pytest.approx(reference[0]["sft_loss"], rel=1e-6)
    if mode == "cached_topk":
        assert 0 < steps[0]["kd_loss"] < reference[0]["kd_loss"]  # over fewer tokens
    else:
        assert steps[0]["kd_loss"] == pytest.approx(reference[0]["kd_loss"], rel=0.5)
    expected = weights(run)
    shutil.rmtree(run / "train" / "final")
    (run / "train" / "manifest.json").unlink()
    for path in (run / "train" / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > 4:
            shutil.rmtree(path)
    pocl("train", *words)
    actual = weights(run)
    assert training_steps(run) == steps
    assert all(bool((actual[key] == expected[key]).all()) for key in expected)


def test_a_teacher_that_does_not_fit_the_disk_stays_online(
    without_dropout: Path, tmp_path: Path
) -> None:
    run = untrained_copy(without_dropout, tmp_path / "run")
    words = ("--run-dir", str(run), "teacher.mode=auto", "teacher_cache.max_disk_gb=0.000001")
    log = pocl("cache-teacher", *words).stderr
    info = json.loads((run / "teacher_cache" / "manifest.json").read_text())["info"]
    assert (
        info["mode"] == "online" and "they do not fit" in info["reason"] and info["reason"] in log
    )
    assert "the teacher is sharded over the ranks" in pocl("train", *words).stderr
    for actual, expected in zip(training_steps(run), training_steps(without_dropout), strict=True):
        assert actual == expected


def test_the_overhead_of_scoring_is_reported(finished: Path) -> None:
    lines: list[str] = []
    result = overhead.run([str(finished)], lines.append)
    assert {"score", "rank", "plan", "train"} <= set(result["seconds"]) and {
        "score",
        "train",
    } <= set(result["flops"])
    assert result["share"] > 0 and 0 < result["flops_share"] < 1
    assert lines[-1].startswith("scoring, ranking and planning add")


@pytest.mark.parametrize(
    ("ranks_before", "ranks_after"),
    [*(pytest.param(*pair, marks=pytest.mark.weekly) for pair in [(2, 1), (1, 2), (4, 2)]), (2, 3)],
)
def test_a_training_resumes_on_another_number_of_ranks(
    without_dropout: Path, tmp_path: Path, ranks_before: int, ranks_after: int
) -> None:
    """It resumes from a checkpoint in the middle of a stage and an epoch, and gives the result of a
    training that had this number of ranks from the start.
    """
    source = without_dropout
    if ranks_before != 2:
        source = untrained_copy(without_dropout, tmp_path / "before")
        pocl(
            "train",
            "--run-dir",
            str(source),
            f"launch.ranks={ranks_before}",
            "train.micro_batch_tokens=96",
        )
    run = Path(
        shutil.copytree(
            source,
            tmp_path / "after",
            ignore=shutil.ignore_patterns("evaluation", "export", "logs", ".lock"),
        )
    )
    shutil.rmtree(run / "train" / "final")
    (run / "train" / "manifest.json").unlink()
    for path in (run / "train" / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > 4:
            shutil.rmtree(path)
    process = pocl(
        "train", "--run-dir", str(run), f"launch.ranks={ranks_after}", "train.micro_batch_tokens=96"
    )
    assert f"was written by {ranks_before} ranks: converting it for {ranks_after}" in process.stderr
    assert json.loads((run / "train" / "manifest.json").read_text())["info"]["resumed_at"] == 4
    for actual, expected in zip(training_steps(run), training_steps(without_dropout), strict=True):
        assert actual.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5)
        assert actual.pop("kd_loss") == pytest.approx(expected.pop("kd_loss"), rel=1e-5)
        assert actual.pop("sft_loss") == pytest.approx(expected.pop("sft_loss"), rel=1e-5)
        assert actual == expected
    actual_weights, expected_weights = weights(without_dropout), weights(run)
    # Adam turns any gradient into an update of about lr = 1e-3, also one that is a rounding error:
    # a few weights differ by a part of that.
    assert (
        max(
            float((actual_weights[name] - expected_weights[name]).abs().max())
            for name in actual_weights
        )
        < 2e-4
    )
    assert not (run / "train" / "checkpoints" / "resharded").exists()


def test_a_killed_training_resumes_with_exactly_the_same_result(
    finished: Path, tmp_path: Path
) -> None:
    run = untrained_copy(finished, tmp_path / "run")
    command = [sys.executable, "-m", "pocl_ds.cli.main", "train", "--run-dir", str(run)]
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    metrics = run / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 11:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    ranks = subprocess.run(
        ["pgrep", "-f", f"train --run-dir {run}"], text=True, capture_output=True
    ).stdout.split()
    for pid in ranks:
        if int(pid) != child.pid:
            os.kill(int(pid), signal.SIGKILL)
    child.kill()
    child.wait()
    time.sleep(1)
    pocl("train", "--run-dir", str(run))
    assert training_steps(run) == training_steps(finished)
    actual, expected = weights(run), weights(finished)
    assert all(actual[name].equal(expected[name]) for name in expected)
    assert json.loads((run / "train" / "manifest.json").read_text())["info"]["resumed_at"] > 0


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGUSR2, marks=pytest.mark.weekly), signal.SIGTERM]
)
def test_a_signal_saves_a_checkpoint_and_exits_with_resume(
    finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """SLURM sends such a signal to launch/train.sh before the time limit. Checkpoints are saved
    asynchronously.
    """
    run = untrained_copy(finished, tmp_path / "run")
    command = [
        "bash",
        "launch/train.sh",
        "--ranks",
        "2",
        "train",
        "--run-dir",
        str(run),
        "train.checkpoint.async_save=true",
    ]
    variables = {**environment(), "POCL_PYTHON": sys.executable}
    child = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)
    metrics = run / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 8:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(number)
    stderr = child.communicate(timeout=120)[1]
    assert child.returncode == 75, stderr[-2000:]
    assert f"stopped by {number.name} after step" in stderr and "Traceback" not in stderr
    pocl("train", "--run-dir", str(run))
    assert training_steps(run) == training_steps(finished)
    assert all(weights(run)[name].equal(value) for name, value in weights(finished).items())
    assert json.loads((run / "train" / "manifest.json").read_text())["info"]["resumed_at"] >= 8
