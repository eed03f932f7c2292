"""Teachers by stage and by domain, on tiny models: each step has the loss of its own teacher, and a
resumed training gives the same result.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import yaml
from command_line import pocl
from tiny_runs import computed, records, stop_after
from transformers import AutoModelForCausalLM

from pocl_ds.cli.main import main
from pocl_ds.curriculum.plan_step import load_plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.workflow.run_dir import RunDirectory

SEED, BATCH = 42, 8


def write_recipe(folder: Path, **changes: dict[str, Any]) -> Path:
    """Three models, 60 samples of two domains, and a recipe of three stages."""
    for name, seed in (("student", 0), ("first", 1), ("second", 2)):
        tiny_models.llama(folder / name, layers=1, seed=seed)
    with (folder / "data.jsonl").open("w") as stream:
        for i in range(60):
            record = {
                "instruction": f"Say {i} and {i * i % 17}.",
                "output": f"It is {i} " * (1 + i % 4),
                "kind": "math" if i % 3 else "chat",
            }
            stream.write(json.dumps(record) + "\n")
    tree: dict[str, Any] = {
        "name": "routed",
        "seed": SEED,
        "data": {
            "source": str(folder / "data.jsonl"),
            "fields": {"domain": "kind"},
            "test_fraction": 0.0,
            "validation_fraction": 0.1,
            "max_train_samples": 48,
        },
        "prompt": {"template": "alpaca", "max_prompt_tokens": 256, "max_length": 320},
        "teacher": {"model": str(folder / "first")},
        "student": {"model": str(folder / "student")},
        "ranking": {"strategy": "random"},
        "loss": {"name": "fkl"},
        "curriculum": {"num_subsets": 3, "epochs_per_stage": 1},
        "train": {
            "batch_size": BATCH,
            "micro_batch_size": 2,
            "lr": 1e-3,
            "checkpoint": {"every_n_steps": 2, "keep_last": 20},
        },
        "launch": {"ranks": 2, "threads_per_rank": 1},
    }
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def plan_run(folder: Path, **changes: dict[str, Any]) -> Path:
    recipe = write_recipe(folder, **changes)
    for step in ("preprocess", "init-student", "rank", "plan"):
        assert main([step, str(recipe), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def divergence(run: Path, step: int, student: Any, teachers: list[Path], temperature: float) -> Any:
    """tau^2 KL per loss token of a step in float64, without code of the package.

    teachers: of each row of the training data.
    """
    index = np.load(run / "data" / "train.index.npy")
    tokens = np.fromfile(run / "data" / "train.tokens.bin", np.uint32)
    models = {path: load(path) for path in set(teachers)}
    total, count = 0.0, 0
    for row in Sampler(load_plan(run / "plan" / "plan.json"), SEED).batch(step):
        start, prompt, size = (int(value) for value in index[row][:3])
        ids = torch.from_numpy(tokens[start : start + size].astype(np.int64))[None]
        with torch.no_grad():
            log_q, log_p = (
                (model(input_ids=ids).logits[0, prompt - 1 : -1] / temperature).log_softmax(-1)
                for model in (student, models[teachers[row]])
            )
        total += float((log_p.exp() * (log_p - log_q)).sum()) * temperature**2
        count += size - prompt
    return total / count


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).double().eval()


def student_after(run: Path, step: int) -> Any:
    """The student after `step` optimizer steps of the plain engine."""
    student = load(run.parent / "student")
    if step:
        checkpoint = run / "train" / "checkpoints" / f"step-{step:08d}" / "torch.pt"
        state = torch.load(checkpoint, weights_only=True)["module"]
        own = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        student.load_state_dict(own)
    return student


def test_each_stage_has_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second = {"model": str(tmp_path / "second")}
    run = plan_run(
        tmp_path,
        teacher={"by_stage": {2: second, 3: second}},
        train={"engine": "torch", "validate_every_n_steps": 1},
        launch={"ranks": 1},
    )
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--run-dir", str(run)]) == 0
    log = " ".join(capsys.readouterr().err.split())
    assert log.count("has the teacher") == 2, "stages 2 and 3 share one, which is not loaded again"
    assert log.count("freed the teacher") == 1

    names = [str(tmp_path / name) for name in ("first", "second", "second")]
    steps = records(run)
    assert [step["stage"] for step in steps] == [0] * 2 + [1] * 4 + [2] * 6
    assert all(step["teacher"] == names[step["stage"]] for step in steps)
    validations = records(run, kind="validation")
    assert all(validation["teacher"] == names[validation["stage"]] for validation in validations)
    for number in (0, 2, 6):
        student, step = student_after(run, number), steps[number]
        losses = [
            divergence(run, number, student, [tmp_path / name] * 48, step["temperature"])
            for name in ("first", "second")
        ]
        own, other = losses if step["stage"] == 0 else losses[::-1]
        assert step["kd_loss"] == pytest.approx(own, rel=1e-4)
        assert step["kd_loss"] != pytest.approx(other, rel=1e-3)


def test_each_domain_has_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = plan_run(
        tmp_path,
        teacher={"by_domain": {"math": {"model": str(tmp_path / "second")}}},
        train={"engine": "torch"},
        launch={"ranks": 1},
    )
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--run-dir", str(run)]) == 0
    steps = records(run)
    names = json.loads((run / "data" / "domains.json").read_text())
    numbers = np.load(run / "data" / "train.domains.npy")
    teachers = [tmp_path / ("second" if names[n] == "math" else "first") for n in numbers]
    for number in (0, 2, 6):
        loss = divergence(
            run, number, student_after(run, number), teachers, steps[number]["temperature"]
        )
        assert steps[number]["kd_loss"] == pytest.approx(loss, rel=1e-4)
    for step in steps:
        assert sum(step["teacher_samples"].values()) == BATCH
    assert any(len(step["teacher_samples"]) == 2 for step in steps)
    assert len(records(run, kind="validation")[0]["teacher_samples"]) == 2


@pytest.mark.parametrize("routes", ["by_stage", "by_domain"])
def test_a_resumed_training_gives_the_same_result(routes: str, tmp_path: Path) -> None:
    key: Any = 2 if routes == "by_stage" else "math"
    teacher = {routes: {key: {"model": str(tmp_path / "second")}}}
    planned = plan_run(tmp_path, teacher=teacher)
    run, stopped, fewer = (
        Path(shutil.copytree(planned, tmp_path / name)) for name in ("whole", "stopped", "fewer")
    )
    log = pocl("train", "--run-dir", str(run)).stderr
    assert (log.count("freed the teacher") == 2) == (routes == "by_stage")
    assert 2 < stop_after(stopped, 4) < 6, "not in the middle of stage 2"
    shutil.rmtree(fewer)
    shutil.copytree(stopped, fewer)

    # The same bits on as many ranks, and the same losses on another number.
    pocl("train", "--run-dir", str(stopped))
    assert computed(stopped) == computed(run)
    if routes == "by_domain":
        return
    pocl("train", "--run-dir", str(fewer), "launch.ranks=1")
    for own, other in zip(computed(fewer), computed(run), strict=True):
        assert own.pop("sample_ids_digest") == other.pop("sample_ids_digest")
        assert own == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_a_domain_that_does_not_occur_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = {"model": str(tmp_path / "second")}
    recipe = write_recipe(tmp_path, teacher={"by_domain": {"math": second, "law": second}})
    assert main(["preprocess", str(recipe), "--run-dir", str(tmp_path / "run")]) != 0
    message = " ".join(capsys.readouterr().err.split())
    counts = RunDirectory(tmp_path / "run").data / "manifest.json"
    domains = json.loads(counts.read_text())["info"]["domains"]["train"]
    assert "teacher.by_domain.law: no training sample has the domain 'law'" in message
    assert all(f"{name} {count}" in message for name, count in domains.items())
