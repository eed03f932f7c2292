"""Every policy on two ranks with tiny models: a training that is stopped and resumed equals an
uninterrupted one. Also the baseline.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from command_line import pocl
from tiny_runs import computed, records, stop_after, write_recipe

from pocl_ds.config import registry
from pocl_ds.data.conversation import read_sample_file

POLICIES = {
    "gkd": [
        "policy.name=gkd",
        "policy.lmbda=0.7",
        "policy.rollout_backend=transformers",
        "policy.sync_weights_every=4",
        "loss.name=jsd",
    ],
    # A learning rate so high that the validation loss rises, which raises phi.
    "distillm": [
        "policy.name=distillm",
        "policy.rollout_backend=transformers",
        "policy.replay_buffer_size=8",
        "policy.phi_step=0.5",
        "policy.loss_tolerance=0",
        "loss.name=skl",
        "train.validate_every_n_steps=2",
        "train.lr=0.05",
    ],
    "seqkd": ["policy.name=seqkd", "loss.name=sft"],
    "mixture": [
        "policy.name=mixture",
        "policy.shares.data=0.3",
        "policy.shares.student=0.4",
        "policy.shares.teacher=0.3",
        "policy.rollout_backend=transformers",
        "loss.by_writer.student.name=srkl",
        "loss.by_writer.teacher.name=skl",
        "policy.staleness=1",
    ],
    "uld, gkd": [
        "policy.name=gkd",
        "policy.lmbda=0.7",
        "policy.rollout_backend=transformers",
        "loss.name=uld",
    ],
}
BASELINES = ("gkd", "distillm")  # the policies whose baseline trains too
STEPS = 18  # epochs of 2 and of 4 steps, 3 of each


def plan_without_sft(folder: Path, *overrides: str, tokenizer: Any = None) -> Path:
    """A run up to its plan. tokenizer: the teacher's; None is the student's."""
    teacher = tiny_models.llama(folder / "teacher", layers=3, tokenizer=tokenizer)
    student = tiny_models.llama(folder / "student", layers=2, seed=1)
    recipe = write_recipe(
        folder,
        teacher,
        student,
        max_train_samples=32,
        policy={"max_new_tokens": 6},
        ranking={"strategy": "random"},
        curriculum={"num_subsets": 2, "epochs_per_stage": 3, "sft_ratio": [0, 0]},
        baseline={"enabled": True, "sft_ratio": 0},
    )
    for step in ("preprocess", "init-student", "rank", "plan"):
        pocl(step, str(recipe), "--run-dir", str(folder / "run"), *overrides)
    return folder / "run"


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plan_without_sft(tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="session")
def planned_cross_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a teacher that has another tokenizer."""
    tokenizer = tiny_models.make_sentencepiece_tokenizer()
    return plan_without_sft(
        tmp_path_factory.mktemp("two-tokenizers"), "loss.name=alm", tokenizer=tokenizer
    )


@pytest.mark.parametrize(
    "name",
    [name if name == "gkd" else pytest.param(name, marks=pytest.mark.weekly) for name in POLICIES],
)
def test_a_resumed_training_of_a_policy_equals_an_uninterrupted_one(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    cross_tokenizer = name.startswith("uld")
    planned = request.getfixturevalue("planned_cross_tokenizer" if cross_tokenizer else "planned")
    run, overrides = Path(shutil.copytree(planned, tmp_path / "run")), POLICIES[name]
    if name in ("seqkd", "mixture"):
        pocl("generate-teacher", "--run-dir", str(run), *overrides)
        response_ids, data_ids = (
            np.load(run / folder / "train.ids.npy") for folder in ("teacher_responses", "data")
        )
        parts = [
            read_sample_file(run / folder / "train.jsonl")
            for folder in ("teacher_responses", "data")
        ]
        assert response_ids.tolist() == data_ids.tolist()
        for response, sample in zip(*parts, strict=True):
            assert response.instruction == sample.instruction
            assert response.references != sample.references
    stopped = Path(shutil.copytree(run, tmp_path / "stopped"))
    pocl("train", "--run-dir", str(run), *overrides)
    steps = records(run)
    assert len(steps) == STEPS
    if name in BASELINES:
        pocl("baseline", "--run-dir", str(run))
        assert len(records(run, "baseline")) == STEPS
    assert all(record["sft_ratio"] == 0 for record in steps)
    if cross_tokenizer:
        assert all(record["kd_loss"] > 0 for record in steps)
    if name == "mixture":
        assert {record["writer"] for record in steps} == {"data", "student", "teacher"}
    if registry.POLICIES[overrides[0].removeprefix("policy.name=")]:
        on_policy = [record for record in steps if record["on_policy"]]
        assert 0 < len(on_policy) < len(steps)
        assert any(
            record["rollout_seconds"] > 0 and 0 < record["rollout_share"] < 1
            for record in on_policy
        )
        staleness = {record["staleness_steps"] for record in on_policy}
        if name == "gkd":
            assert max(staleness) in (1, 2, 3)
        else:
            assert (staleness == {0}) == ("policy.staleness=1" not in overrides)
    if name == "distillm":
        # It validates before the first step too: otherwise a stage could end before phi changes.
        for training in ("train", "baseline"):
            assert [record["step"] for record in records(run, training, "validation")] == list(
                range(0, STEPS + 1, 2)
            )
            assert any(record["on_policy"] for record in records(run, training))
        assert any(record["on_policy"] and record["rollout_seconds"] == 0 for record in steps), (
            "the buffer was never replayed"
        )

    assert stop_after(stopped, 5, *overrides) < STEPS
    pocl("train", "--run-dir", str(stopped))
    assert computed(stopped) == computed(run)
    assert records(stopped, kind="validation") == records(run, kind="validation")
    weights = [
        (path / "train" / "final" / "model.safetensors").read_bytes() for path in (run, stopped)
    ]
    assert weights[0] == weights[1]


def test_a_run_with_alm(planned_cross_tokenizer: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(planned_cross_tokenizer, tmp_path / "run"))
    process = pocl("run", "--run-dir", str(run))
    assert (
        "each read their own tokens: " in process.stderr
        and "without a KL to the teacher" in process.stderr
    )
    for training in ("train", "baseline"):
        steps = records(run, training)
        assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
        assert all(step["kd_loss"] > 0 for step in steps)
    models = json.loads((run / "evaluation" / "results.json").read_text())["models"]
    assert (
        "loss" not in models["teacher"] and models["teacher"]["benchmarks"]["test"]["samples"] > 0
    )
    assert models["student"]["loss"] > 0 and "kl" not in models["student"]


def test_two_tokenizers_need_a_cross_tokenizer_loss(
    planned_cross_tokenizer: Path, tmp_path: Path
) -> None:
    recipe = planned_cross_tokenizer / "recipe.yaml"
    process = pocl(
        "preprocess", str(recipe), "--run-dir", str(tmp_path / "run"), "loss.name=fkl", check=False
    )
    assert process.returncode == 2
    assert "different tokenizers" in process.stderr and "loss.name=alm or uld" in process.stderr
    overrides = [
        "loss.name=sft",
        "policy.name=seqkd",
        "baseline.enabled=false",
        "student.heal_steps=2",
    ]
    process = pocl(
        "preprocess", str(recipe), "--run-dir", str(tmp_path / "run"), *overrides, check=False
    )
    assert (
        process.returncode == 2
        and "student.heal_steps=2 heals by plain distillation" in process.stderr
    ), process.stderr


@pytest.mark.vllm
def test_vllm_generates_next_to_the_ranks_with_their_weights(planned: Path, tmp_path: Path) -> None:
    """Training compares vLLM's log-probabilities with the student's after each weight transfer: a
    training that finishes has passed that check. The responses of a step are generated while the
    step before trains.
    """
    run = Path(shutil.copytree(planned, tmp_path / "run"))
    process = pocl(
        "train",
        "--run-dir",
        str(run),
        "policy.name=gkd",
        "policy.lmbda=1",
        "policy.sync_weights_every=4",
        "policy.staleness=1",
        "loss.name=jsd",
    )
    assert "vllm generates the student's responses" in process.stderr
    steps = records(run)
    assert len(steps) == STEPS and all(record["on_policy"] for record in steps)
    staleness = [record["staleness_steps"] for record in steps]
    assert staleness == [0, *(1 + (step - 1) % 4 for step in range(1, STEPS))]
    assert all(record["rollout_wait_seconds"] > 0 for record in steps)
