"""A study of two arms through the real command: what they share is done once, and the pair is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import yaml
from command_line import pocl
from tiny_runs import write_recipe


@pytest.fixture
def study(tmp_path: Path) -> Path:
    teacher = tiny_models.llama(tmp_path / "teacher", layers=3)
    student = tiny_models.llama(tmp_path / "student", layers=2, seed=1)
    recipe = write_recipe(tmp_path, teacher, student, train_samples=32, evaluate={"models": ["student"], "loss": False},
                          train={"engine": "torch"}, launch={"ranks": 1})  # fmt: skip
    tree = {"name": "pair", "base": str(recipe), "arms": {"kd": ["plan.subsets=1", "plan.epochs_per_stage=4"], "pocl": []},
            "compare": [["pocl", "kd"]]}  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "study.yaml"


def test_a_study_of_two_arms(study: Path) -> None:
    folder = study.parent / "runs"
    found = pocl("study", str(study), "--run-dir", str(folder))
    assert "study 2/2: pocl-seed42 (shares data, prepare, score, rank)" in found.stderr
    assert (folder / "kd-seed42" / "scores").stat().st_ino != (folder / "pocl-seed42" / "scores").stat().st_ino
    assert "pocl beside kd: " in found.stdout and "1 training each" in found.stdout and "NOT EQUAL" not in found.stdout
    again = pocl("study", str(study), "--run-dir", str(folder))
    assert "study 1/2: kd-seed42 is done already" in again.stderr and found.stdout.endswith(again.stdout)

    ranked = study.with_name("ranked.yaml")  # the same cells, of which only the order is asked
    ranked.write_text(study.read_text() + "until: rank\n")
    asked = pocl("study", str(ranked), "--run-dir", str(folder), "--watch").stdout
    assert "kd-seed42, pocl-seed42" in asked and "better" not in asked
    told = pocl("difficulty", str(folder / "kd-seed42"), str(folder / "pocl-seed42"), "--subsets", "2").stdout
    assert told.splitlines()[-1].split()[-2:] == ["100%", "100%"]  # one student, one order
