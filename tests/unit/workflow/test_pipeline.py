"""The steps in order, and engines side by side: which GPUs or cores each one gets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl_ds.config import Recipe
from pocl_ds.errors import RecipeError
from pocl_ds.workflow import pipeline
from pocl_ds.workflow.fork_server import ForkServer
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory
from pocl_ds.workflow.run_setup import record_recipe
from pocl_ds.workflow.steps import STEP_NAMES, STEPS, fingerprints

Calls = list[tuple[list[list[str]], list[dict[str, str]]]]


def recipe(processes: int, tensor_parallel: int = 1, backend: str = "vllm") -> Recipe:
    evaluate = {
        "data_parallel_size": processes,
        "generation": {"tensor_parallel_size": tensor_parallel, "backend": backend},
        "models": ["student"],
    }
    return Recipe.model_validate(
        {
            "name": "r",
            "data": {"source": "d.jsonl"},
            "student": {"model": "m"},
            "loss": {"name": "sft"},
            "evaluate": evaluate,
        }
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    recorded: Calls = []

    def record_call(commands: list[list[str]], environments: list[dict[str, str]]) -> int:
        recorded.append((commands, environments))
        return 0

    monkeypatch.setattr(pipeline, "run_processes", record_call)
    return recorded


def run_engines(recipe: Recipe) -> Any:
    return pipeline._run_engines(["pocl", "evaluate", "--model", "student"], recipe)


def test_each_engine_gets_its_own_gpus(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run_engines(recipe(2, 2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a,7")
    run_engines(recipe(3))
    (commands, devices), (_, visible_devices) = calls
    assert [command[-2:] for command in commands] == [["--shard", "0/2"], ["--shard", "1/2"]]
    assert devices == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in visible_devices] == [
        "5",
        "GPU-a",
        "7",
    ]
    with pytest.raises(
        RecipeError,
        match=r"data_parallel_size=2 with tensor_parallel_size=2 needs 4 GPUs, and 3 are visible",
    ):
        run_engines(recipe(2, 2))


def test_engines_without_gpus_share_the_cores(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    run_engines(recipe(3))
    assert calls[0][1] == [{"OMP_NUM_THREADS": "2"}] * 3


@pytest.mark.parametrize(
    ("backend", "models"), [("vllm", [["--model", "student"], []]), ("transformers", [[]])]
)
def test_engines_of_vllm_alone_have_their_own_processes(
    backend: str,
    models: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last process collects the answers, and with transformers generates them first."""
    run, started = RunDirectory(tmp_path / "run"), list[list[str]]()
    run.data.mkdir(parents=True)
    (run.data / "test.jsonl").write_text("{}\n")
    imported: set[str] = set()

    def record_run(module: str, words: list[str], imports: tuple[str, ...]) -> int:
        started.append(words)
        imported.update(imports)
        return 0

    with ForkServer() as server:
        monkeypatch.setattr(server, "run", record_run)
        assert pipeline.run_step("evaluate", run, recipe(1, backend=backend), server) == 0
    arguments = ["evaluate", "--run-dir", str(run.path)]
    assert started == [[*arguments, *words] for words in models]
    assert imported == {"vllm" if backend == "vllm" else "models"}


def test_students_share_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, started = RunDirectory(tmp_path / "run"), list[list[str]]()
    run.data.mkdir(parents=True)
    (run.data / "test.jsonl").write_text("{}\n")
    tree = recipe(1, backend="vllm").model_dump(mode="json")
    tree["evaluate"]["models"] = ["teacher", "initial", "student"]
    tree |= {"loss": {"name": "fkl"}, "teacher": {"model": "t"}, "baseline": {"enabled": True}}
    with ForkServer() as server:
        monkeypatch.setattr(server, "run", lambda _, words, __: started.append(words[3:]) or 0)
        assert pipeline.run_step("evaluate", run, Recipe.model_validate(tree), server) == 0
    assert started == [["--model", "initial,student,baseline"], ["--model", "teacher"], []]


@pytest.fixture
def finished_training(tmp_path: Path) -> tuple[RunDirectory, Recipe]:
    """A run whose evaluation is next, without test samples."""
    tree = {**recipe(1).model_dump(mode="json"), "ranking": {"strategy": "random"}}
    run, config = RunDirectory(tmp_path / "run"), Recipe.model_validate(tree)
    record_recipe(run, config)
    for step in STEPS[: STEP_NAMES.index("evaluate")]:
        step.directory(run).mkdir()
        write_manifest(step.directory(run), step.name, fingerprints(config)[step.name])
    (run.data / "test.jsonl").touch()
    return run, config


@pytest.mark.parametrize("code", [0, 2, 143])
def test_a_failed_evaluation_costs_no_export(
    code: int,
    finished_training: tuple[RunDirectory, Recipe],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    started: list[str] = []

    def run_step(name: str, *_arguments: Any) -> int:
        started.append(name)
        return code if name == "evaluate" else 0

    monkeypatch.setattr(pipeline, "run_step", run_step)
    run, config = finished_training
    expected = {0: ["evaluate", "export", "report"], 2: ["evaluate", "export"], 143: ["evaluate"]}
    assert pipeline.run_pipeline(config, run, ForkServer()) == code
    assert started == expected[code]  # a signal ends the pipeline
    assert ("exporting the student without its results" in caplog.text) == (code == 2)
    assert pipeline.run_pipeline(config, run, ForkServer(), until="evaluate") == code
    assert started[-1] == "evaluate"


def test_a_missing_test_split_is_told_before_training(
    finished_training: tuple[RunDirectory, Recipe],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also if `preprocess` ran on another day."""
    warned: list[bool] = []
    monkeypatch.setattr(
        pipeline, "run_step", lambda *_: warned.append("no test samples" in caplog.text) or 0
    )
    run, config = finished_training
    (run.train / "manifest.json").unlink()
    assert pipeline.run_pipeline(config, run, ForkServer(), until="train") == 0
    assert warned == [True]
