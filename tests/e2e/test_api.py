"""The public Python interface: a run from models and records in memory, and from a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_ds import Recipe, RunResult, distill, run
from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.errors import DataError, ModelError, PoclError, RecipeError

RECORDS = [
    {"instruction": f"Say {i} and {i * i % 17}.", "output": f"It is {i} " * (1 + i % 4)}
    for i in range(60)
]
GENERATION = {"backend": "transformers", "max_num_seqs": 16}
FIELDS: dict[str, Any] = {
    "data__test_fraction": 0.1,
    "data__validation_fraction": 0.1,
    "data__max_train_samples": 16,
    "prompt__template": "chat",
    "prompt__max_prompt_tokens": 64,
    "prompt__max_length": 96,
    "score__generation": GENERATION,
    "score__max_new_tokens": 4,
    "curriculum__num_subsets": 2,
    "curriculum__epochs_per_stage": 1,
    "train__batch_size": 8,
    "train__engine": "torch",
    "evaluate__generation": GENERATION,
    "evaluate__seeds": [1],
    "evaluate__max_new_tokens": 4,
}


def test_distill_from_memory(tmp_path: Path, tiny_llama: Path, tiny_llama_untied: Path) -> None:
    """The result holds the paths and metrics; a second call reuses every finished step."""
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama_untied)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_untied)

    def call(**fields: Any) -> RunResult:
        return distill(
            teacher=teacher,
            teacher_tokenizer=tokenizer,
            student=str(tiny_llama),
            data=RECORDS,
            output_dir=tmp_path / "run 1",
            **FIELDS,
            **fields,
        )

    result = call()
    assert result.run_dir == tmp_path / "run 1" and result.report.is_file()
    assert set(result.metrics) == {"teacher", "initial", "student"}
    assert result.metrics["student"]["loss"] > 0
    assert AutoModelForCausalLM.from_pretrained(result.student).config.model_type == "llama"
    recipe = load_recipe(str(result.run_dir / "recipe.yaml"))
    assert recipe.name == "run-1" and recipe.curriculum.num_subsets == 2

    trained = (result.run_dir / "train" / "manifest.json").stat().st_mtime_ns
    assert call().metrics == result.metrics
    assert (result.run_dir / "train" / "manifest.json").stat().st_mtime_ns == trained
    assert run(recipe, result.run_dir).metrics == result.metrics
    with pytest.raises(PoclError, match="holds the finished step"):
        call(seed=7, train__lr=1.0)


def test_faults_are_one_sentence(tmp_path: Path, tiny_llama: Path) -> None:
    def call(**changes: Any) -> RunResult:
        model = str(tiny_llama)
        arguments: dict[str, Any] = {"teacher": model, "student": model, "data": RECORDS}
        return distill(**{**arguments, "output_dir": tmp_path / "run", **changes})

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    faults: list[tuple[dict[str, Any], type[PoclError], str]] = [
        ({"student": model}, ModelError, "student is a model in memory without a tokenizer"),
        ({"data": 3}, DataError, "data is a int"),
        ({"data": {"train": RECORDS}}, DataError, "one split of a datasets.DatasetDict"),
        ({"train__lrr": 1}, RecipeError, "train.lrr does not exist: did you mean lr?"),
        ({"train": 1}, RecipeError, "train"),
    ]
    for changes, kind, words in faults:
        with pytest.raises(kind, match=re.escape(words)) as caught:
            call(**changes)
        assert "\n" not in str(caught.value)


def test_a_folder_of_something_else_stays_untouched(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(PoclError, match="not empty and holds no recipe"):
        distill(teacher=str(tiny_llama), student=str(tiny_llama), data=RECORDS, output_dir=tmp_path)
    assert not (tmp_path / "inputs").exists()


def test_a_recipe_by_its_shipped_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="neither a file nor a shipped recipe"):
        run("quickstrt", tmp_path / "run")
    assert isinstance(load_recipe("quickstart"), Recipe)
