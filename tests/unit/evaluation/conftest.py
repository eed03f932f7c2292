"""Runs that are ready to be evaluated: encoded data, models, and a finished training of tiny
models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.config import DataConfig, EvaluateConfig, GenerationConfig, PromptConfig
from pocl_ds.data.preprocess import preprocess
from pocl_ds.models.load import load_tokenizer
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

PROMPT = PromptConfig(max_prompt_tokens=300, max_length=400)
RECIPE = """name: tiny
student: {model: gpt2-tiny, prune: null, heal_steps: 0}
teacher: {model: /home/somebody/secret/teacher}
prompt: {template: alpaca, max_prompt_tokens: 300}
loss: {name: fkl}
policy: {name: "off"}
ranking: {strategy: fusion, reverse: false}
train: {lr: 0.001, min_lr: 0.0, lr_restart: per_stage}
data: {source: /home/somebody/secret/data.jsonl}
"""


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, tiny_llama_untied: Path) -> RunDirectory:
    """Data, plan and a finished training: teacher and initial student are two tiny LLaMAs of
    unequal head sizes.
    """
    run = RunDirectory(tmp_path / "run")
    source = tmp_path / "samples.jsonl"
    with source.open("w") as stream:
        for i in range(60):
            stream.write(
                json.dumps(
                    {
                        "id": f"s{i}",
                        "instruction": f"Say the number {i}.",
                        "input": "x" * (i % 3),
                        "output": f"the number is {i} " * (1 + i % 4),
                    }
                )
                + "\n"
            )
    data = DataConfig(source=str(source), test_fraction=0.3, validation_fraction=0.0)
    preprocess(run, data, PROMPT, load_tokenizer(str(tiny_llama)), "d" * 64)
    write_json(
        run.models / "models.json", {"teacher": str(tiny_llama_untied), "student": str(tiny_llama)}
    )
    stage = {
        "index": 0,
        "start": 0,
        "stop": 40,
        "temperature": 1.0,
        "sft_ratio": 0.3,
        "epochs": 1,
        "steps_per_epoch": 5,
        "steps": 5,
    }
    write_json(
        run.plan / "plan.json",
        {"batch_size": 8, "scheduler": "baby_step", "drop_last": True, "stages": [stage]},
    )
    write_manifest(run.plan, "plan", "p" * 64)
    train_to(run, tiny_llama_untied)
    return run


def train_to(run: RunDirectory, model: Path) -> None:
    """A training whose outcome is that model, sealed as the trainer seals it."""
    final = run.train / "final"
    shutil.copytree(model, final)
    files = [path for path in sorted(final.rglob("*")) if path.is_file()]
    write_manifest(
        run.train, "train", "t" * 64, info={"steps": 5, "seconds": 1.0, "ranks": 2}, files=files
    )


@pytest.fixture
def configured() -> Callable[..., EvaluateConfig]:
    """Makes an evaluation by the transformers backend: two seeds, short answers, or as told."""

    def make(**changes: Any) -> EvaluateConfig:
        settings = {
            "generation": GenerationConfig(backend="transformers"),
            "seeds": (10, 20),
            "max_new_tokens": 8,
            "max_samples": 6,
        }
        return EvaluateConfig(**(settings | changes))

    return make


@pytest.fixture
def prompt() -> PromptConfig:
    """How the run's samples were encoded."""
    return PROMPT


@pytest.fixture
def recipe() -> str:
    """A resolved recipe that names folders of somebody's machine."""
    return RECIPE
