"""Errors that need real ranks or a real process: one sentence, exit code 2, no partial files.

Ctrl-C gives exit code 130, and the same command continues. The other files of this folder have the
errors that need neither.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import pocl, start
from refusals import restored_signals
from tiny_runs import write_recipe

from pocl_ds.cli.main import main
from pocl_ds.workflow.manifest import VERIFIED, read_manifest, write_manifest

GOOD = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(40)]


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def recipe(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_llama_untied: Path
) -> Path:
    """A small recipe without errors."""
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(
        folder,
        tiny_llama_untied,
        tiny_llama,
        max_train_samples=24,
        prompt={"template": "plain"},
        curriculum={"num_subsets": 2, "epochs_per_stage": 1},
        train={"batch_size": 4, "checkpoint": {"every_n_steps": 2}},
        evaluate={"temperature": 0},
    )


def assert_refused(process: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Assert that a command ended with one sentence that contains these parts."""
    assert process.returncode == 2, (process.returncode, process.stderr[-2000:])
    assert "Traceback" not in process.stderr
    messages = [line for line in process.stderr.splitlines() if line.startswith("pocl ")]
    assert len(messages) == 1, process.stderr[-2000:]
    for part in parts:
        assert part in messages[0], messages[0]


def partial_files(folder: Path) -> list[Path]:
    """Files with a final name, below a folder without a manifest."""
    if not folder.is_dir() or (folder / "manifest.json").is_file():
        return []
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def test_overlong_samples_are_counted(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No error: a response is truncated, a question is not, and the log has their numbers."""
    path = tmp_path / "long.jsonl"
    long = [
        {"instruction": "Say much.", "output": "word " * 300},
        {"instruction": "w " * 900, "output": "a"},
    ]
    path.write_text(lines([*GOOD, *long]))
    words = [f"data.source={path}", "data.max_train_samples=null", "data.test_fraction=0.1"]
    with restored_signals():
        assert main(["preprocess", str(recipe), "--run-dir", str(tmp_path / "run"), *words]) == 0
    found = re.findall(r"(\d+) truncated, (\d+) dropped", capsys.readouterr().err)
    assert [sum(int(counts[place]) for counts in found) for place in (0, 1)] == [1, 1]


def test_too_little_memory_for_two_ranks(recipe: Path, tmp_path: Path, finished: Path) -> None:
    """The teacher's configuration has 100 layers of width 16,384: refused before any loading."""
    run = shutil.copytree(
        finished,
        tmp_path / "run",
        ignore=shutil.ignore_patterns("train", "evaluation", "export", "report"),
    )
    huge = shutil.copytree(
        json.loads((run / "models" / "models.json").read_text())["teacher"], tmp_path / "huge"
    )
    config = json.loads((huge / "config.json").read_text())
    config |= {
        "num_hidden_layers": 100,
        "hidden_size": 16384,
        "intermediate_size": 65536,
        "num_attention_heads": 64,
    }
    (huge / "config.json").write_text(json.dumps(config))
    models = json.loads((run / "models" / "models.json").read_text())
    (run / "models" / "models.json").write_text(json.dumps({**models, "teacher": str(huge)}))
    manifest = read_manifest(run / "models")
    assert manifest
    write_manifest(run / "models", manifest.step, manifest.fingerprint, info=manifest.info)
    assert_refused(
        pocl("train", "--run-dir", str(run), check=False), "2 ranks", "of memory", "launch.ranks"
    )
    assert partial_files(run / "train") == []


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    pocl("run", str(recipe), "--run-dir", str(run))
    return run


def test_a_benchmark_without_references(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(
        finished,
        tmp_path / "run",
        ignore=shutil.ignore_patterns("evaluation", "export", "report", "logs"),
    )
    path = tmp_path / "bad.jsonl"
    path.write_text(lines([{"instruction": "Say it."}] * 3))
    words = ["--model", "student", f"evaluate.benchmarks.mine={path}"]
    process = pocl("evaluate", "--run-dir", str(run), *words, check=False)
    assert_refused(process, "bad.jsonl line 1", "output", "evaluate.benchmarks.mine.fields")
    assert partial_files(run / "evaluation") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_while_saving(finished: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    shutil.copytree(
        finished,
        run,
        ignore=shutil.ignore_patterns("train", "evaluation", "export", "report", "logs"),
    )
    filler = small_disk / "filler"
    filler_bytes = shutil.disk_usage(small_disk).free - 300_000
    filler.write_bytes(b"0" * filler_bytes)
    before = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file()
        and path.name not in (".lock", "recipe.yaml", "input_digests.json")
        and path.suffix != VERIFIED
    }
    assert_refused(pocl("train", "--run-dir", str(run), check=False), "space", str(run))
    assert all(path.read_bytes() == content for path, content in before.items())
    assert partial_files(run / "train" / "final") == []
    filler.unlink()
    pocl("train", "--run-dir", str(run))
    weights, expected = (
        (path / "train" / "final" / "model.safetensors").read_bytes() for path in (run, finished)
    )
    assert weights == expected


STEPS = (
    "preprocess",
    "init-student",
    "score",
    "rank",
    "plan",
    "train",
    "evaluate",
    "export",
    "report",
)
FOLDERS = {"init-student": "models", "score": "scores", "rank": "ranking", "evaluate": "evaluation"}


# A process that imports, one that generates text, training ranks, and evaluation engines.
@pytest.mark.parametrize("step", ["preprocess", "score", "train", "evaluate"])
def test_ctrl_c(step: str, recipe: Path, finished: Path, tmp_path: Path) -> None:
    """INT a moment after the step began; then the same command finishes it."""
    later_folders = [FOLDERS.get(name, name) for name in STEPS[STEPS.index(step) :]]
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns(*later_folders, "logs"))
    child = start("run", str(recipe), "--run-dir", str(run))
    deadline = time.monotonic() + 60
    lock = run / ".lock"
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep({"train": 9.0, "score": 5.0, "evaluate": 5.0}.get(step, 1.5))
    os.kill(child.pid, signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    if child.returncode == 0:
        pytest.skip(f"{step} was finished before the signal came")
    # A shell shows 130 for both. Python ends by the signal itself if it arrives while C code runs
    # Python code, as in an import.
    assert child.returncode in (130, -signal.SIGINT), (child.returncode, stderr[-2000:])
    assert "Traceback" not in stderr
    assert sum(line.startswith(("pocl ", "pocl: ")) for line in stderr.splitlines()) == 1, stderr[
        -2000:
    ]
    # On a busy machine the signal may arrive in an earlier step.
    for name in STEPS[: STEPS.index(step) + 1]:
        if not (run / FOLDERS.get(name, name) / "manifest.json").is_file():
            pocl(name, str(recipe), "--run-dir", str(run))
    if step == "train":
        weights, expected = (
            (path / "train" / "final" / "model.safetensors").read_bytes()
            for path in (run, finished)
        )
        assert weights == expected
