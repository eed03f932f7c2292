"""A run of models with custom code, which the recipe trusts; the export contains that code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
from command_line import pocl
from tiny_runs import write_recipe
from transformers import AutoModelForCausalLM


@pytest.mark.weekly
@pytest.mark.usefixtures("modules_of_models")
def test_a_run_of_models_with_custom_code(tmp_path: Path) -> None:
    teacher = tiny_models.add_custom_code(tiny_models.llama(tmp_path / "teacher", layers=3))
    student = tiny_models.add_custom_code(tiny_models.llama(tmp_path / "student", layers=2, seed=1))
    recipe = write_recipe(
        tmp_path,
        teacher,
        student,
        max_train_samples=24,
        curriculum={"num_subsets": 2, "epochs_per_stage": 1},
        ranking={"strategy": "random"},
        launch={"ranks": 1},
        loss={"fused": False},
        teacher={"trust_remote_code": True, "attn_implementation": "sdpa"},
        student={"trust_remote_code": True, "attn_implementation": "sdpa"},
        evaluate={"models": ["teacher", "student"], "seeds": [1], "benchmarks": ["test"]},
    )
    pocl("run", str(recipe), "--run-dir", str(tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["models"]
    assert results["student"]["kl"] > 0 and results["teacher"]["loss"] > 0
    assert all((tmp_path / "run" / "export" / name).is_file() for name in tiny_models.CUSTOM_CODE)
    exported = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "export", trust_remote_code=True
    )
    assert type(exported).__name__ == "CustomModel" and exported.config.num_hidden_layers == 2
