"""Recipes that ask a model for more than its configuration allows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.config import Recipe
from pocl_ds.errors import ModelError
from pocl_ds.workflow.model_checks import check_model_configs


def change_config(folder: Path, target: Path, **fields: Any) -> str:
    """A copy of a model folder with other fields in its config.json."""
    shutil.copytree(folder, target)
    tree = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**tree, **fields}))
    return str(target)


def check(teacher: str, student: str, /, **sections: Any) -> None:
    tree: dict[str, Any] = {
        "name": "r",
        "data": {"source": "d.jsonl"},
        "prompt": {"max_prompt_tokens": 30, "max_length": 40},
        "score": {"max_new_tokens": 10},
        "evaluate": {"max_new_tokens": 10},
        "student": {"model": student},
        "teacher": {"model": teacher},
        "train": {"batch_size": 8},
    }
    for section, fields in sections.items():
        tree[section] = {**tree.get(section, {}), **fields}
    recipe = Recipe.model_validate(tree)
    check_model_configs(recipe, recipe.student, recipe.teacher)


def test_limits_above_the_positions_of_a_model(tiny_gpt2: Path, tmp_path: Path) -> None:
    long = str(tiny_gpt2)
    short = change_config(tiny_gpt2, tmp_path / "short", n_positions=40)
    check(short, short)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt": {"max_length": 41}}, "prompt.max_length=41"),
        (
            {"score": {"max_new_tokens": 11}},
            r"prompt.max_prompt_tokens=30 \+ score.max_new_tokens=11",
        ),
        (
            {"evaluate": {"max_new_tokens": 12}},
            r"prompt.max_prompt_tokens=30 \+ evaluate.max_new_tokens=12",
        ),
    ]
    for fields, message in cases:
        with pytest.raises(ModelError, match=f"{message} is more than the 40 positions of {short}"):
            check(long, short, **fields)
    # The teacher answers the benchmarks too, unless it is not evaluated.
    evaluate = {"max_new_tokens": 12, "models": ["student"]}
    with pytest.raises(ModelError, match="evaluate.max_new_tokens=12 is more than the 40"):
        check(short, long, evaluate={"max_new_tokens": 12})
    check(short, long, evaluate=evaluate, score={"max_new_tokens": 50})
    # A random ranking scores nothing.
    check(long, short, score={"max_new_tokens": 50}, ranking={"strategy": "random"})
    sequence_level = {"loss": {"name": "sft"}, "policy": {"name": "seqkd", "max_new_tokens": 13}}
    with pytest.raises(ModelError, match="policy.max_new_tokens=13 is more than the 40 positions"):
        check(short, long, **sequence_level)


def test_a_student_that_skips_layers(tiny_opt: Path, tmp_path: Path) -> None:
    folder = change_config(tiny_opt, tmp_path / "m", layerdrop=0.5)
    check(folder, str(tiny_opt))  # a teacher is not in training mode
    check(str(tiny_opt), folder, student={"dropout": 0})
    with pytest.raises(ModelError, match=r"m has layerdrop=0.5 in its config.json"):
        check(str(tiny_opt), folder)
