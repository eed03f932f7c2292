"""A whole run of tiny models through the real command line: real ranks, real DeepSpeed, every stage
to the report.

Trainings on other engines, ranks and micro-batches must come to the same losses and weights; one
that is killed and started again must come to exactly the same.
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
from pocl_ds.runtime.tracking import read_metrics


def steps(run: Path) -> list[dict[str, Any]]:
    kept = (
        "step",
        "stage",
        "epoch",
        "loss",
        "kd",
        "ce",
        "temperature",
        "sft_ratio",
        "lr",
        "tokens",
        "sample_ids_digest",
    )
    return [
        {key: record[key] for key in kept}
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


def test_every_stage_leaves_its_result(finished: Path) -> None:
    for stage in ("data", "models", "ranking", "plan", "train", "evaluation", "export", "report"):
        assert (finished / stage / "manifest.json").is_file()
    results = json.loads((finished / "evaluation" / "results.json").read_text())["models"]
    assert set(results) == {"teacher", "initial", "student"}
    assert results["teacher"]["kl"] == 0 and results["student"]["kl"] < results["initial"]["kl"]
    records = steps(finished)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert [
        s["steps"] for s in json.loads((finished / "plan" / "plan.json").read_text())["stages"]
    ] == [4, 8, 14]
    assert len(records) == 26
    info = json.loads((finished / "train" / "manifest.json").read_text())["info"]
    assert info["packed"] and 0 < info["padding_share"] < 1


def test_no_secret_of_the_environment_is_in_it(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert (
        len(files) > 50 and [path for path in files if PLANTED.encode() in path.read_bytes()] == []
    )


def test_its_files_are_as_open_as_the_umask_says(finished: Path) -> None:
    """`pocl` of the tests runs under 022."""
    modes = {path.relative_to(finished): path.stat().st_mode for path in finished.rglob("*")}
    assert [name for name, mode in modes.items() if mode & 0o022 or not mode & 0o040] == []


def test_a_second_call_finds_everything_done(finished: Path) -> None:
    before = (finished / "train" / "manifest.json").stat().st_mtime_ns
    found = pocl("run", "--run-dir", str(finished))
    assert found.stderr.count("done already") == 9
    assert (finished / "train" / "manifest.json").stat().st_mtime_ns == before


def test_a_run_directory_of_another_recipe_is_refused(finished: Path) -> None:
    found = pocl("run", "--run-dir", str(finished), "ranking.k=10", check=False)
    assert found.returncode == 2 and "ranking.k" in found.stderr and "--run-dir" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.fixture(scope="module")
def undropped(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without dropout, whose masks follow from the rank: so the mathematics is the same on
    any number of them.
    """
    folder = tmp_path_factory.mktemp("undropped")
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    recipe["student"] |= {
        "heal_steps": 0,
        "prune": None,
        "dropout": 0.0,
        "model": str(finished / "models" / "heal" / "final"),
    }
    recipe["curriculum"] |= {"num_subsets": 2, "epochs_per_stage": 1}
    recipe["train"]["checkpoint"] |= {"every": 2, "keep": 10}
    path, run = folder / "recipe.yaml", folder / "run"
    path.write_text(yaml.safe_dump(recipe))
    for stage in ("preprocess", "init-student", "score", "rank", "plan", "train"):
        pocl(stage, str(path), "--run-dir", str(run))
    return run


@pytest.mark.parametrize(
    "change",
    [
        ["train.engine=torch", "launch.ranks=1"],
        ["launch.ranks=1", "train.micro_batch_size=8"],
        ["train.micro_batch_tokens=200", "train.layout=padded"],
        ["student.ds_config=student_zero2", "train.layout=padded"],
    ],
)
def test_other_engines_ranks_and_micro_batches_come_to_the_same(
    undropped: Path, tmp_path: Path, change: list[str]
) -> None:
    other = untrained_copy(undropped, tmp_path / "run")
    pocl("train", "--run-dir", str(other), *change)
    runs = [undropped, other]
    for ours, theirs in zip(steps(runs[0]), steps(runs[1]), strict=True):
        assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=2e-5)
        assert ours.pop("kd") == pytest.approx(theirs.pop("kd"), rel=2e-5)
        assert ours.pop("ce") == pytest.approx(theirs.pop("ce"), rel=2e-5)
        assert ours == theirs
    left, right = weights(runs[0]), weights(runs[1])
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 2e-4


def test_a_teacher_that_was_asked_once_teaches_the_same(undropped: Path, tmp_path: Path) -> None:
    """Its hidden states on disk in place of its body; a shard that is lost is made anew, alone."""
    run = untrained_copy(undropped, tmp_path / "run")
    words = ("--run-dir", str(run), "teacher.mode=cached_hidden_states", "teacher_cache.shards=3")
    missing = pocl("train", *words, check=False)
    assert (
        missing.returncode == 2
        and "run `pocl cache-teacher`" in missing.stderr
        and "Traceback" not in missing.stderr
    )
    pocl("cache-teacher", *words)
    before = {path.name: path.stat().st_mtime_ns for path in (run / "teacher").glob("*.bin")}
    for name in ("manifest.json", "train-00001-of-00003.bin"):
        (run / "teacher" / name).unlink()
    pocl(
        "cache-teacher",
        "--run-dir",
        str(run),
        "teacher.mode=cached_hidden_states",
        "--shard",
        "1/3",
    )
    after = {path.name: path.stat().st_mtime_ns for path in (run / "teacher").glob("*.bin")}
    assert {name for name in before if before[name] != after[name]} == {"train-00001-of-00003.bin"}
    shutil.move(run / "teacher", tmp_path / "teacher")
    shutil.copytree(tmp_path / "teacher", run / "teacher")
    found = pocl("train", *words)
    assert "the teacher is on disk" in found.stderr
    for ours, theirs in zip(steps(run), steps(undropped), strict=True):
        for name in ("loss", "kd", "ce"):
            assert ours.pop(name) == pytest.approx(theirs.pop(name), rel=2e-6)
        assert ours == theirs
    left, right = weights(undropped), weights(run)
    # Adam makes a step of lr = 1e-3 of any gradient's sign, also where that is rounding: a few
    # weights differ by a part of it.
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 2e-4

    damaged = untrained_copy(run, tmp_path / "damaged")
    path = damaged / "teacher" / "train-00002-of-00003.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    found = pocl("train", "--run-dir", str(damaged), check=False)
    assert (
        found.returncode == 2
        and f"{path} is damaged at row" in found.stderr
        and "Traceback" not in found.stderr
    )
    path.write_bytes(path.read_bytes()[:-4])
    found = pocl("train", "--run-dir", str(damaged), check=False)
    assert (
        found.returncode == 2
        and "is missing, or not what `pocl cache-teacher` wrote" in found.stderr
    )


def test_a_teacher_of_few_probabilities(undropped: Path, tmp_path: Path) -> None:
    run = untrained_copy(undropped, tmp_path / "run")
    words = ("--run-dir", str(run), "teacher.mode=cached_topk", "teacher_cache.top_k=16")
    said = pocl("cache-teacher", *words).stderr
    info = json.loads((run / "teacher" / "manifest.json").read_text())["info"]
    assert info["mode"] == "cached_topk" and [one["temperature"] for one in info["lost"]] == [
        1.0,
        2.0,
    ]
    assert 0 < info["lost"][0]["mass"] < info["lost"][1]["mass"] < 1 and all(
        one["kl"] > 0 for one in info["lost"]
    )
    assert "the 16 largest leave out a mass of" in said
    pocl("train", *words)
    ours, theirs = steps(run), steps(undropped)
    assert len(ours) == len(theirs) and ours[0]["ce"] == pytest.approx(theirs[0]["ce"], rel=1e-6)
    assert 0 < ours[0]["kd"] < theirs[0]["kd"]  # over fewer outcomes


def test_a_teacher_that_is_not_worth_keeping_is_asked_live(undropped: Path, tmp_path: Path) -> None:
    run = untrained_copy(undropped, tmp_path / "run")
    words = ("--run-dir", str(run), "teacher.mode=auto", "teacher_cache.max_disk_gb=0.000001")
    said = pocl("cache-teacher", *words).stderr
    info = json.loads((run / "teacher" / "manifest.json").read_text())["info"]
    assert info["mode"] == "online" and "they do not fit" in info["why"] and info["why"] in said
    assert "the teacher is sharded over the ranks" in pocl("train", *words).stderr
    for ours, theirs in zip(steps(run), steps(undropped), strict=True):
        assert ours == theirs


def test_the_overhead_of_scoring_is_told(finished: Path) -> None:
    lines: list[str] = []
    found = overhead.run([str(finished)], lines.append)
    assert {"score", "rank", "plan", "train"} <= set(found["seconds"]) and {
        "score",
        "train",
    } <= set(found["flops"])
    assert found["share"] > 0 and 0 < found["flops_share"] < 1
    assert lines[-1].startswith("scoring, ranking and planning add")


@pytest.mark.parametrize(("first", "then"), [(2, 1), (2, 3), (1, 2), (4, 2)])
def test_another_number_of_ranks_goes_on(
    undropped: Path, tmp_path: Path, first: int, then: int
) -> None:
    """From a checkpoint in the middle of a stage and an epoch, as if all steps had been on as many
    ranks.
    """
    source = undropped
    if first != 2:
        source = untrained_copy(undropped, tmp_path / "first")
        pocl(
            "train",
            "--run-dir",
            str(source),
            f"launch.ranks={first}",
            "train.micro_batch_tokens=96",
        )
    run = Path(
        shutil.copytree(
            source,
            tmp_path / "then",
            ignore=shutil.ignore_patterns("evaluation", "export", "logs", ".lock"),
        )
    )
    shutil.rmtree(run / "train" / "final")
    (run / "train" / "manifest.json").unlink()
    for path in (run / "train" / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > 4:
            shutil.rmtree(path)
    found = pocl(
        "train", "--run-dir", str(run), f"launch.ranks={then}", "train.micro_batch_tokens=96"
    )
    assert f"was written by {first} ranks: converting it for {then}" in found.stderr
    assert json.loads((run / "train" / "manifest.json").read_text())["info"]["resumed_at"] == 4
    for ours, theirs in zip(steps(run), steps(undropped), strict=True):
        assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-5)
        assert ours.pop("kd") == pytest.approx(theirs.pop("kd"), rel=1e-5)
        assert ours.pop("ce") == pytest.approx(theirs.pop("ce"), rel=1e-5)
        assert ours == theirs
    left, right = weights(undropped), weights(run)
    # Adam makes a step of lr = 1e-3 of any gradient's sign, also where that is rounding: a few
    # weights differ by a part of it.
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 2e-4
    assert not (run / "train" / "checkpoints" / "resharded").exists()


def test_killed_and_started_again_comes_to_exactly_the_same(finished: Path, tmp_path: Path) -> None:
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
    assert steps(run) == steps(finished)
    ours, theirs = weights(run), weights(finished)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert json.loads((run / "train" / "manifest.json").read_text())["info"]["resumed_at"] > 0


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_saves_and_says_resume_me(
    finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """As SLURM sends it to launch/train.sh before the time limit; checkpoints are written while
    training goes on.
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
    where = {**environment(), "POCL_PYTHON": sys.executable}
    child = subprocess.Popen(command, cwd=ROOT, env=where, stderr=subprocess.PIPE, text=True)
    metrics = run / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 8:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(number)
    said = child.communicate(timeout=120)[1]
    assert child.returncode == 75, said[-2000:]
    assert f"stopped by {number.name} after step" in said and "Traceback" not in said
    pocl("train", "--run-dir", str(run))
    assert steps(run) == steps(finished)
    assert all(weights(run)[name].equal(value) for name, value in weights(finished).items())
    assert json.loads((run / "train" / "manifest.json").read_text())["info"]["resumed_at"] >= 8
