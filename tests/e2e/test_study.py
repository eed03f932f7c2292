"""A study of two arms through the real command: shared steps run once, and the pair is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import yaml
from command_line import ROOT, pocl
from tiny_runs import write_recipe


@pytest.fixture
def study(tmp_path: Path) -> Path:
    teacher = tiny_models.llama(tmp_path / "teacher", layers=3)
    student = tiny_models.llama(tmp_path / "student", layers=2, seed=1)
    recipe = write_recipe(
        tmp_path,
        teacher,
        student,
        max_train_samples=32,
        evaluate={"models": ["student"], "held_out_loss": False},
        train={"engine": "torch"},
        launch={"ranks": 1},
    )
    tree = {
        "name": "pair",
        "base": str(recipe),
        "arms": {"kd": ["curriculum.num_subsets=1", "curriculum.epochs_per_stage=4"], "pocl": []},
        "compare": [["pocl", "kd"]],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "study.yaml"


def test_a_study_of_two_arms(study: Path) -> None:
    folder = study.parent / "runs"
    output = pocl("study", str(study), "--run-dir", str(folder))
    assert "study 2/2: pocl-seed42 (reuses preprocess, init-student, score, rank)" in output.stderr
    assert (folder / "kd-seed42" / "scores").stat().st_ino != (
        folder / "pocl-seed42" / "scores"
    ).stat().st_ino
    assert "pocl against kd: " in output.stdout and "1 training each" in output.stdout
    # Subsets of 10, 20 and 32 samples leave incomplete batches of 2 and 4 samples at batch size 8.
    assert (
        "NOT EQUAL: a sample is visited on average 4.00 times by kd, 3.50 times by pocl"
        in output.stdout
    )
    again = pocl("study", str(study), "--run-dir", str(folder))
    assert "study 1/2: kd-seed42 is already finished" in again.stderr
    assert output.stdout.endswith(again.stdout)

    ranked = study.with_name("ranked.yaml")  # the same cells, ranked only
    ranked.write_text(study.read_text() + "until: rank\n")
    difficulty = pocl("study", str(ranked), "--run-dir", str(folder), "--watch").stdout
    assert "kd-seed42, pocl-seed42" in difficulty and "better" not in difficulty
    agreement = pocl(
        "compare-difficulty",
        *("--run-dir", str(folder / "kd-seed42")),
        *("--run-dir", str(folder / "pocl-seed42")),
        *("--subsets", "2"),
    ).stdout
    # Both cells rank with the same student.
    row = next(x for x in agreement.splitlines() if x.startswith("kd-seed42, pocl-seed42"))
    assert row.split()[-2:] == ["100%", "100%"]


@pytest.mark.weekly
def test_the_study_script(tmp_path: Path) -> None:
    """launch/study.sh fine-tunes a teacher, distils one cell of the shipped study from it, and
    evaluates it on benchmark files.
    """
    model = tiny_models.llama(tmp_path / "model", layers=30)
    with (tmp_path / "data.jsonl").open("w") as stream:
        for i in range(120):
            stream.write(
                json.dumps({"instruction": f"Say {i}.", "output": f"It is {i} " * (1 + i % 3)})
                + "\n"
            )
    (tmp_path / "benchmarks").mkdir()
    for name in ("dolly", "self_inst", "vicuna", "sni"):
        item = {"instruction": f"Is it {name}?", "output": "It is."}
        (tmp_path / "benchmarks" / f"{name}.jsonl").write_text(json.dumps(item) + "\n")
    shipped = yaml.safe_load((ROOT / "launch" / "studies" / "small.yaml").read_text())
    shipped.update(
        arms={"pocl": []},
        grid={"loss": {"rkl": shipped["grid"]["loss"]["rkl"]}},
        seeds=[10],
        compare=[],
    )
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(shipped))
    quick = [
        "data.max_train_samples=32",
        "data.max_test_samples=4",
        "data.max_validation_samples=8",
        "evaluate.max_new_tokens=8",
        "evaluate.generation.backend=transformers",
    ]
    cell = [
        "student.heal_steps=2",
        "score.generation.backend=transformers",
        "score.max_new_tokens=8",
        "curriculum.num_subsets=2",
    ]
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "STUDY": str(tmp_path / "one.yaml"),
        "RUNS": str(tmp_path / "runs"),
        "TEACHER_FIELDS": " ".join([*quick, f"student.model={model}"]),
    }
    process = subprocess.run(
        [
            "bash",
            "launch/study.sh",
            str(tmp_path / "data.jsonl"),
            str(tmp_path / "benchmarks"),
            *quick,
            *cell,
        ],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=380,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    table = process.stdout.splitlines()
    assert [
        word
        for word in next(line for line in table if "trainings" in line).split()
        if word in ("dolly", "sni")
    ]
    assert any(line.startswith("pocl, rkl") for line in table)
    run = tmp_path / "runs" / "cells" / "pocl-rkl-seed10"
    assert json.loads((run / "export" / "config.json").read_text())["num_hidden_layers"] == 10
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["teacher"]["model"] == str(tmp_path / "runs" / "teacher" / "export")
