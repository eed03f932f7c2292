"""Samples longer than a model can read are refused before scoring and training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from refusals import error_message, restored_signals
from tiny_runs import write_recipe

from pocl_ds.cli.main import main


def limit_positions(model: Path, target: Path, positions: int) -> Path:
    """A copy of a model with fewer positions in its configuration."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "n_positions": positions}))
    return target


@pytest.mark.parametrize("limited_model", ["teacher", "student"])
def test_a_sample_that_a_model_cannot_read(
    limited_model: str, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = limit_positions(tiny_gpt2, tmp_path / "short", 40)
    models = (path, tiny_gpt2) if limited_model == "teacher" else (tiny_gpt2, path)
    recipe = write_recipe(
        tmp_path, *models, max_train_samples=24, ranking={"strategy": "random"}, launch={"ranks": 1}
    )
    message = error_message(capsys, "init-student", recipe, "--run-dir", tmp_path / "run")
    assert message == f"prompt.max_length=96 is more than the 40 positions of {path}: lower it"
    words = ["prompt.max_length=40", "prompt.max_prompt_tokens=30"]
    with restored_signals():
        assert main(["init-student", str(recipe), "--run-dir", str(tmp_path / "run"), *words]) == 0
