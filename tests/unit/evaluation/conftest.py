"""A run that is ready to be evaluated: tokenized data, and a finished training of tiny models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer

from pocl_ds.config import DataConfig, EvaluateConfig, GenerationConfig, PromptConfig
from pocl_ds.data.preprocess import preprocess
from pocl_ds.evaluation.answers import answers_file
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
    """Data, plan and a finished training. Teacher and initial student are two tiny LLaMAs whose
    heads differ in size.
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
    finish_training(run, tiny_llama_untied)
    return run


def finish_training(run: RunDirectory, model: Path) -> None:
    """Write a finished training whose student is that model."""
    final = run.train / "final"
    shutil.copytree(model, final)
    files = [path for path in sorted(final.rglob("*")) if path.is_file()]
    write_manifest(
        run.train, "train", "t" * 64, info={"steps": 5, "seconds": 1.0, "ranks": 2}, files=files
    )


@pytest.fixture
def make_config() -> Callable[..., EvaluateConfig]:
    """Makes a configuration: transformers backend, two seeds, short answers, and changes."""

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
    """The prompt configuration of the run's data."""
    return PROMPT


@pytest.fixture
def recipe() -> str:
    """A resolved recipe with local paths."""
    return RECIPE


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    """A judge's endpoint that gives every answer 7 points."""
    server = JudgeServer()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Twelve answers of two models with one seed."""
    run = RunDirectory(tmp_path / "run")
    run.data.mkdir(parents=True)
    (run.data / "train.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"instruction": "Question?", "output": "ref"}\n')
    monkeypatch.chdir(tmp_path)
    for model in ("initial", "student"):
        file = answers_file(run, model, "b", 10)
        file.parent.mkdir(parents=True)
        file.write_text(
            "".join(
                json.dumps(
                    {
                        "id": f"q{i}",
                        "instruction": f"Question {i}?",
                        "input": "context",
                        "references": [f"ref {i}", "other"],
                        "response": f"{model} says {i}",
                        "rouge_l": 0.5,
                        "exact_match": False,
                    }
                )
                + "\n"
                for i in range(12)
            )
        )
        write_manifest(
            file.parent,
            "answers",
            "f",
            files=[file],
            name=f"{file.name}.manifest.json",
            info={
                "seconds": 1.0,
                "tokens": 60,
                "generation_seconds": 2.0,
                "cut_prompts": 0,
                "settings": {"rouge_tokenizer": "rouge_score"},
            },
        )
    return run
