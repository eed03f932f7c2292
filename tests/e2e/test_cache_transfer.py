"""`pocl cache-teacher --export` and `--import`: a run that imports its cache has the same losses,
bit by bit.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import computed, records
from torch.nn.modules.module import register_module_forward_pre_hook
from two_domains import run_here, write_models_and_data

from pocl_ds.cli.main import main
from pocl_ds.teachers.cache import TeacherCache

CACHED = {"mode": "cached_topk", "ds_config": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, and 40 samples of two domains."""
    return write_models_and_data(tmp_path_factory.mktemp("transfer"), 40)


def make_run(folder: Path, name: str, **changes: dict[str, Any]) -> Path:
    """A run whose next steps are `cache-teacher` and `train`, in this process."""
    tree: dict[str, Any] = {
        "name": "transfer",
        "data": {
            "source": str(folder / "data.jsonl"),
            "fields": {"domain": "kind"},
            "test_fraction": 0.0,
            "validation_fraction": 0.1,
        },
        "prompt": {"template": "alpaca", "max_prompt_tokens": 256, "max_length": 320},
        "teacher": {
            "model": str(folder / "first"),
            "by_domain": {"math": {"model": str(folder / "second")}},
            **CACHED,
        },
        "teacher_cache": {"top_k": 16, "shards": 2},
        "student": {"model": str(folder / "student")},
        "ranking": {"strategy": "random"},
        "curriculum": {"num_subsets": 2, "epochs_per_stage": 1},
        "train": {"batch_size": 8, "micro_batch_size": 2, "lr": 1e-3, "engine": "torch"},
        "launch": {"ranks": 1, "threads_per_rank": 1},
    }
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    for step in ("preprocess", "init-student", "rank", "plan"):
        assert main([step, str(recipe), "--run-dir", str(folder / name)]) == 0
    return folder / name


def test_a_run_with_an_imported_cache_has_the_same_losses(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = make_run(folder, "first-run")
    exported = str(folder / "exported")
    for step in ("cache-teacher", "train"):
        assert run_here(step, first) == 0
    assert main(["cache-teacher", "--run-dir", str(first), "--export", exported]) == 0

    # The same models in another place.
    for name in ("first", "second"):
        shutil.copytree(folder / name, folder / f"moved-{name}")
    teacher = {
        "model": str(folder / "moved-first"),
        "by_domain": {"math": {"model": str(folder / "moved-second")}},
    }
    second = make_run(folder, "second-run", teacher=teacher, teacher_cache={"shards": 3})
    words = ["cache-teacher", "--run-dir", str(second), "--import"]
    assert main([*words, exported]) == 0
    assert main([*words, exported]) == 0  # finished: nothing to do
    assert main(["cache-teacher", "--run-dir", str(second), "--dry-run"]) == 0
    assert "cache-teacher     finished" in capfd.readouterr().out
    scratch = folder / "scratch"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POCL_SCRATCH", str(scratch))
        assert run_here("train", second, "teacher_cache.local_copy=$POCL_SCRATCH/me") == 0
    assert computed(second) == computed(first)
    # It read the copies of both teachers.
    copies = [
        f"{path.name}/{file.name}" for path in scratch.glob("me/*") for file in path.glob("*")
    ]
    folders = {path.name for path in (second / "teacher_cache").iterdir() if path.is_dir()}
    assert {name.partition("/")[0] for name in copies} == {f"teacher-cache-{f}" for f in folders}
    assert sum(name.endswith(".bin") for name in copies) == 2 * 2 * 3

    # A run with another template refuses it, in one sentence.
    third = make_run(folder, "third-run", teacher=teacher, prompt={"template": "plain"})
    capfd.readouterr()
    assert main(["cache-teacher", "--run-dir", str(third), "--import", exported]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "has template alpaca, and this recipe has plain" in error
    # Both options at once are refused too.
    assert main([*words, exported, "--export", exported]) == 2
    assert "use one of them" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("read_seconds", "forward_seconds"), [(0.04, 0.12), (0.12, 0.0)], ids=["ahead", "behind"]
)
def test_slow_reads_overlap_with_the_step(
    read_seconds: float,
    forward_seconds: float,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step has four micro-batches of two samples. Reads that take less time than the forward pass
    of the student cost next to nothing; those that take longer show in `data_seconds`.
    """
    run = tmp_path / "run"
    shutil.copytree(folder / "first-run", run, ignore=shutil.ignore_patterns("train", "logs"))
    read, count = TeacherCache.read, []

    def read_slowly(*arguments: Any) -> Any:
        time.sleep(read_seconds)
        count.append(1)
        return read(*arguments)

    def compute_slowly(module: torch.nn.Module, *_: Any) -> None:
        if type(module).__name__ == "LlamaModel":
            time.sleep(forward_seconds)

    monkeypatch.setattr(TeacherCache, "read", read_slowly)
    handle = register_module_forward_pre_hook(compute_slowly)
    try:
        assert run_here("train", run) == 0
    finally:
        handle.remove()
    # The first steps find nothing that was read before.
    steps = records(run)[2:]
    assert len(count) >= 4 * len(steps)
    reading = 4 * read_seconds * len(steps)
    waited = sum(step["data_seconds"] for step in steps)
    if forward_seconds:
        assert waited < 0.5 * reading
    else:
        # What the rest of the step covers depends on how busy the machine is.
        covered = sum(step["seconds"] for step in steps) - waited
        assert waited > 0.7 * (reading - covered)
