"""Samples longer than a model can read are refused before hours of scoring and training, not by an
index error, or after them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from refusals import own_signals, sentence
from tiny_runs import write_recipe

from pocl_ds.cli.main import main


def short(model: Path, target: Path, positions: int) -> Path:
    """A copy of a model whose configuration says that it has fewer positions."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "n_positions": positions}))
    return target


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_sample_that_a_model_cannot_read(
    who: str, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = short(tiny_gpt2, tmp_path / "short", 40)
    models = (path, tiny_gpt2) if who == "teacher" else (tiny_gpt2, path)
    recipe = write_recipe(
        tmp_path, *models, max_train_samples=24, ranking={"strategy": "random"}, launch={"ranks": 1}
    )
    said = sentence(capsys, "init-student", recipe, "--run-dir", tmp_path / "run")
    assert said == f"prompt.max_length=96 is more than the 40 positions of {path}: lower it"
    words = ["prompt.max_length=40", "prompt.max_prompt_tokens=30"]
    with own_signals():
        assert main(["init-student", str(recipe), "--run-dir", str(tmp_path / "run"), *words]) == 0
