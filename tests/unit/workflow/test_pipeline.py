"""Engines side by side: which GPUs or cores each one gets."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from pocl_ds.config import Recipe
from pocl_ds.errors import RecipeError
from pocl_ds.workflow import pipeline

Calls = list[tuple[list[list[str]], list[dict[str, str]]]]


def recipe(processes: int, tensor_parallel: int = 1) -> Recipe:
    evaluate = {
        "data_parallel_size": processes,
        "generation": {"tensor_parallel_size": tensor_parallel},
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

    def record_call(
        commands: list[list[str]], environments: list[dict[str, str]], lock: int | None = None
    ) -> int:
        recorded.append((commands, environments))
        return 0

    monkeypatch.setattr(pipeline, "run_processes", record_call)
    return recorded


def run_engines(recipe: Recipe) -> Any:
    return pipeline._run_engines(["pocl", "evaluate", "--model", "student"], recipe, 3)


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
