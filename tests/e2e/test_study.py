"""A study of two arms through the real command: shared steps run once, and the pair is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from command_line import ROOT, pocl, start
from tiny_runs import write_recipe
from transformers import AutoModelForCausalLM

from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.runtime.hashing import select_by_hash
from pocl_ds.runtime.metrics import read_metrics
from pocl_ds.workflow.run_dir import RunDirectory


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
        data={"source": "tasks", "max_validation_samples": 24, "max_test_samples": 9},
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
    """Two processes run it together: each cell once, and what both cells need once."""
    folder = study.parent / "runs"
    words = ("study", str(study), "--run-dir", str(folder))
    both = [start(*words) for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    started = [
        line for _, log in outputs for line in log.splitlines() if "finished, running" in line
    ]
    names = sorted(line.split("running ")[1].split()[0] for line in started)
    assert names == ["kd-seed42", "pocl-seed42"]
    assert any("pocl-seed42 (reuses preprocess, init-student, score" in line for line in started)
    tables = [output[output.index("cell  ") :] for output, _ in outputs]
    assert tables[0] == tables[1]
    assert (folder / "kd-seed42" / "scores").stat().st_ino != (
        folder / "pocl-seed42" / "scores"
    ).stat().st_ino
    assert "pocl against kd: " in tables[0] and "1 training each" in tables[0]
    again = pocl(*words)
    assert "running" not in again.stderr and again.stdout == tables[0]

    page = (folder / "study.html").read_text()
    assert 'aria-label="effects"' in page and ">test: pocl against kd</text>" in page
    assert '"title":"level-4"' in page
    # The validation loss of each domain, here the level of a task.
    assert any("forgot level-1" in line for line in tables[0].splitlines())
    assert_losses_by_level(RunDirectory(folder / "kd-seed42"))

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


def assert_losses_by_level(run: RunDirectory) -> None:
    """The last validation equals transformers' loss of the final student, level by level."""
    record = read_metrics(run.train / "metrics.jsonl", "validation")[-1]
    split = TokenizedSplit.open(run.data, "validation")
    model = AutoModelForCausalLM.from_pretrained(run.train / "final").eval()
    sums: dict[str, list[float]] = {}
    for row in select_by_hash(split.ids, record["samples"]):
        ids = torch.tensor(split.tokens(row).astype(int))
        labels = torch.where(torch.tensor(split.loss_mask(row)), ids, -100)
        with torch.no_grad():
            loss = model(ids[None], labels=labels[None]).loss.item()
        level = sums.setdefault(f"level-{split.ids[row].decode().split('-')[1]}", [0.0, 0.0])
        tokens = int(split.loss_tokens[row])
        level[0], level[1] = level[0] + tokens * loss, level[1] + tokens
    expected = {level: total / tokens for level, (total, tokens) in sums.items()}
    assert len(expected) > 1
    assert record["validation_loss_by_domain"] == pytest.approx(expected, rel=1e-4)
    mean = sum(total for total, _ in sums.values()) / sum(tokens for _, tokens in sums.values())
    assert record["validation_loss"] == pytest.approx(mean, rel=1e-4)


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
