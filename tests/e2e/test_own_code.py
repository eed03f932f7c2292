"""Models that bring code of their own go the whole way where the recipe trusts them, and what is exported brings it too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
from command_line import pocl
from tiny_runs import write_recipe
from transformers import AutoModelForCausalLM

OWN = {
    "own_config.py": "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "own_model.py": "from transformers import LlamaForCausalLM\n\nfrom .own_config import OwnConfig\n\n\n"
                    "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}  # fmt: skip


def with_code(folder: Path) -> Path:
    tree = json.loads((folder / "config.json").read_text())
    tree |= {"model_type": "own", "architectures": ["OwnModel"],
             "auto_map": {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(tree))
    for name, text in OWN.items():
        (folder / name).write_text(text)
    return folder


def test_a_run_of_models_with_code_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    teacher = with_code(tiny_models.llama(tmp_path / "teacher", layers=3))
    student = with_code(tiny_models.llama(tmp_path / "student", layers=2, seed=1))
    recipe = write_recipe(
        tmp_path, teacher, student, train_samples=24, plan={"subsets": 2, "epochs_per_stage": 1}, rank={"strategy": "random"},
        launch={"ranks": 1}, loss={"fused": False}, teacher={"trust_remote_code": True, "attention": "sdpa"},
        student={"trust_remote_code": True, "attention": "sdpa"},
        evaluate={"models": ["teacher", "student"], "seeds": [1], "benchmarks": ["test"]},
    )  # fmt: skip
    pocl("run", str(recipe), "--run-dir", str(tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["models"]
    assert results["student"]["kl"] > 0 and results["teacher"]["loss"] > 0
    assert all((tmp_path / "run" / "export" / name).is_file() for name in OWN)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export", trust_remote_code=True)
    assert type(exported).__name__ == "OwnModel" and exported.config.num_hidden_layers == 2
