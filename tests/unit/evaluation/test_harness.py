"""Standard tasks by the real lm-evaluation-harness, on a task of our own and tiny models."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_ds.config import EvaluateConfig
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.errors import ArtifactError, ModelError, RecipeError, ResourceError
from pocl_ds.evaluation.harness import _run_request, run_harness
from pocl_ds.evaluation.harness_results import harness_lines, read_harness_results
from pocl_ds.workflow.checks import check_harness
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.run_dir import RunDirectory

ITEMS = [
    {"question": f"The fox jumps over {n} dogs. It jumps over", "choices": choices, "gold": n % 3}
    for n, choices in enumerate([[" one", " two", " the lazy dog"]] * 6)
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task `foxes`, which asks for one of three continuations."""
    tasks_of_package: Any = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    # Reading all tasks of the package takes seconds.
    managers = functools.cache(tasks_of_package.TaskManager)
    monkeypatch.setattr(tasks_of_package, "TaskManager", managers)
    items = folder / "items.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    task = {
        "task": "foxes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "foxes.yaml").write_text(yaml.safe_dump(task))
    return folder


def config_of(folder: Path, **fields: Any) -> EvaluateConfig:
    harness = {"tasks": ["foxes"], "include_path": str(folder), **fields}
    return EvaluateConfig.model_validate({"harness": harness})


def run_here(started: list[str]) -> Callable[[list[str]], int]:
    """Runs the program's request in this process."""

    def run(command: list[str]) -> int:
        assert command[-2] == "pocl_ds.evaluation.harness"
        request = read_json(Path(command[-1]))
        started.append(request["path"])
        _run_request(request)
        return 0

    return run


def chosen(folder: Path, item: dict[str, Any]) -> int:
    """The most probable continuation, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    scores = []
    for choice in item["choices"]:
        prompt = tokenizer(item["question"], add_special_tokens=False).input_ids
        ids = tokenizer(item["question"] + choice, add_special_tokens=False).input_ids
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        scores.append(sum(log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
    return max(range(len(scores)), key=scores.__getitem__)


def test_each_model_runs_the_tasks_once(
    tasks: Path, tmp_path: Path, tiny_llama: Path, tiny_gpt2: Path
) -> None:
    run, started = RunDirectory(tmp_path / "run"), list[str]()
    paths = {"initial": str(tiny_gpt2), "student": str(tiny_llama)}
    run_harness(run, config_of(tasks), paths, run_here(started))
    assert started == list(paths.values())
    for model, path in paths.items():
        values = read_harness_results(run, model)["foxes"]["values"]["acc,none"]
        expected = [float(chosen(Path(path), item) == item["gold"]) for item in ITEMS]
        assert [values[str(n)] for n in range(len(ITEMS))] == expected
        means = read_harness_results(run, model)["foxes"]["means"]
        assert means["acc,none"] == pytest.approx(sum(expected) / len(expected))

    # A finished result is reused, unless the task or the settings have changed.
    run_harness(run, config_of(tasks), paths, run_here(started))
    assert len(started) == 2
    for config, task_files in ((config_of(tasks), ["x"]), (config_of(tasks, max_samples=2), [])):
        student = {"student": paths["student"]}
        run_harness(run, config, student, run_here(started), task_files=task_files)
    assert len(started) == 4
    assert len(read_harness_results(run, "student")["foxes"]["values"]["acc,none"]) == 2

    # The table, and the difference on the documents that both have.
    results = {
        "models": {
            model: {"harness": {"foxes": read_harness_results(run, model)["foxes"]["means"]}}
            for model in paths
        }
    }
    lines = harness_lines(run, results)
    assert lines[0].split() == ["foxes", "acc"] and len(lines) == 4
    assert lines[3].startswith("foxes acc: student after minus student before ")
    assert harness_lines(run, {"models": {"student": {}}}) == []


def test_tasks_that_fail(tasks: Path, tmp_path: Path, tiny_llama: Path) -> None:
    run, paths = RunDirectory(tmp_path / "run"), {"student": str(tiny_llama)}
    with pytest.raises(RecipeError, match=r"names nothing_of_it, which lm_eval .* does not have"):
        run_harness(run, config_of(tasks, tasks=["nothing_of_it"]), paths, run_here([]))
    (tasks / "items.jsonl").unlink()
    with pytest.raises(ModelError, match=r"lm_eval cannot run foxes with .*items.jsonl"):
        run_harness(run, config_of(tasks), paths, run_here([]))
    with pytest.raises(ArtifactError, match="failed with the model student, see above"):
        run_harness(run, config_of(tasks), paths, lambda command: 2)
    assert read_harness_results(run, "student") == {}


@pytest.mark.parametrize("value", ["[gsm8k, ifeval]", "gsm8k, ifeval", "{tasks: [gsm8k, ifeval]}"])
def test_tasks_are_a_list_or_a_section(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("quickstart", [f"evaluate.harness={value}"])
    assert recipe.evaluate.harness and recipe.evaluate.harness.tasks == ("gsm8k", "ifeval")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"needs the package lm_eval.*pocl_ds\[harness\]"):
        check_harness(recipe)
    with pytest.raises(RecipeError, match="evaluate.harness"):
        load_recipe("quickstart", ["evaluate.harness=[]"])
