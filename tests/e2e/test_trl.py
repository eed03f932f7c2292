"""The curriculum in SFTTrainer, GKDTrainer and DistillationTrainer of TRL, on one rank and two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from command_line import TWO_RANKS, run_module
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("trl")  # needs Python 3.11
from trl_trainers import BATCH, KINDS, MICRO_BATCH, RECORDS, make_trainer, rows_seen

from pocl_ds.curriculum import CurriculumSampler, build_plan
from pocl_ds.errors import RecipeError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("trl") / "teacher", seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, teacher: Path) -> Any:
    """A trainer of each kind, after training on one rank."""
    out = tmp_path_factory.mktemp("one-rank")
    trainers = {kind: make_trainer(kind, tiny_llama, teacher, out / kind) for kind in KINDS}
    for trainer in trainers.values():
        trainer.train()
    return trainers


@pytest.mark.parametrize("kind", ["sft", "gkd"])
def test_trl_trains_like_a_plain_loop(
    kind: str, trained: Any, tiny_llama: Path, teacher: Path
) -> None:
    """Against full logits and autograd over the same batches."""
    trainer = trained[kind]
    sampler = trainer.curriculum.sampler
    # The batches are those of the plan.
    expected = [
        (step, part.tolist())
        for step in range(sampler.plan.total_steps)
        for part in sampler.micro_batches(step)[0]
    ]
    assert rows_seen(trainer) == expected and len(expected) == 2 * sampler.plan.total_steps

    student, teacher_model = (
        AutoModelForCausalLM.from_pretrained(path).double() for path in (tiny_llama, teacher)
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    for step in range(sampler.plan.total_steps):
        stage, losses, tokens = sampler.stage(step), [], 0
        for inputs in (inputs for number, inputs in trainer.seen if number == step):
            for ids, mask, labels in zip(
                inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True
            ):
                ids, labels = ids[mask.bool()][None], labels[mask.bool()]
                trains = labels[1:] != -100
                tokens += int(trains.sum())
                logits = student(input_ids=ids).logits[0, :-1][trains]
                with torch.no_grad():
                    target = teacher_model(input_ids=ids).logits[0, :-1][trains]
                p, q = ((x / stage.temperature).log_softmax(-1) for x in (target, logits))
                kd = stage.temperature**2 * (p.exp() * (p - q)).sum()
                ce = torch.nn.functional.cross_entropy(logits, labels[1:][trains], reduction="sum")
                losses.append(stage.sft_ratio * ce + (1 - stage.sft_ratio) * kd)
        (sum(losses) / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = dict(trainer.model.named_parameters())
    for name, value in student.named_parameters():
        torch.testing.assert_close(weights[name].double(), value, rtol=1e-4, atol=2e-6)


def test_trl_generates_for_the_prompts_of_the_plan(trained: Any) -> None:
    trainer = trained["distillation"]
    sampler = trainer.curriculum.sampler
    steps = range(sampler.plan.total_steps)
    for step, (seen, prompts) in zip(steps, trainer.seen, strict=True):
        rows = [row for part in sampler.micro_batches(step)[0] for row in part]
        assert seen == step and prompts == [RECORDS[row]["prompt"] for row in rows]
    assert trainer.temperatures == [sampler.stage(step).temperature for step in steps for _ in "12"]
    assert {trainer.temperatures[0], trainer.temperatures[-1]} == {1.0, 2.0}


def test_two_ranks_train_like_one(
    trained: Any, tiny_llama: Path, teacher: Path, tmp_path: Path
) -> None:
    """Each rank has the batches that `pocl train` would give it. DistillationTrainer samples its
    responses, so only its prompts are compared.
    """
    arguments = [str(path) for path in (tiny_llama, teacher, tmp_path)]
    run_module("trl_trainers", *arguments, launcher=TWO_RANKS)
    for kind, trainer in trained.items():
        plan = trainer.curriculum.sampler.plan
        for rank in (0, 1):
            sampler = CurriculumSampler(
                plan, 3, micro_batch_size=MICRO_BATCH, rank=rank, world_size=2
            )
            seen = json.loads((tmp_path / f"{kind}-{rank}.json").read_text())
            assert [step for step, _ in seen] == list(range(plan.total_steps))
            assert [row for _, rows in seen for row in rows] == list(sampler)
        if kind != "distillation":
            weights = load_file(tmp_path / f"{kind}.safetensors")
            for name, value in trainer.model.named_parameters():
                torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-6)


def test_a_trainer_that_generates_refuses_what_its_loss_lacks(trained: Any) -> None:
    trainer = trained["distillation"]
    trainer.args.max_steps, order = -1, list(range(len(RECORDS)))
    with pytest.raises(RecipeError, match=r"build the plan with sft_ratio=\(0, 0\)"):
        trainer.use_curriculum(build_plan(order, epochs_per_stage=1, batch_size=BATCH))
    flat = {"num_subsets": 1, "epochs_per_stage": 1, "batch_size": BATCH, "sft_ratio": (0, 0)}
    plan = build_plan(order, **flat)
    with pytest.raises(RecipeError, match="has no token rule and no sample weights"):
        trainer.use_curriculum(plan, token_rule="adakd")
    weighted = build_plan(order, **flat, sample_weights=np.arange(1, 25, dtype=np.float32))
    with pytest.raises(RecipeError, match="has no token rule and no sample weights"):
        trainer.use_curriculum(weighted)
