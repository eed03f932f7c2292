"""The curriculum in the trainer of transformers, in Lightning and in a plain loop: the batches,
losses and weights of `pocl train`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import ROOT, TWO_RANKS, run_module
from other_trainers import Samples, collate, make_trainer
from safetensors.torch import load_file
from tiny_runs import write_recipe
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from pocl_ds.curriculum import CurriculumSampler
from pocl_ds.curriculum.plan_step import load_plan
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError, ModelError, RecipeError
from pocl_ds.runtime.metrics import read_metrics
from pocl_ds.training.step_batches import StepPlan

MICRO_BATCH_SIZE = 2


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_llama_untied: Path
) -> Path:
    """A run that trained with plain PyTorch, with sample weights and a token rule."""
    folder = tmp_path_factory.mktemp("other-trainers")
    path = write_recipe(
        folder,
        tiny_llama_untied,
        tiny_llama,
        max_train_samples=24,
        ranking={"strategy": "random"},
        curriculum={
            "num_subsets": 2,
            "epochs_per_stage": 2,
            "sft_ratio": [0.5, 0.2],
            "sample_weights": {"name": "hard_more"},
        },
        loss={"token_rule": {"name": "adakd"}},
        train={"engine": "torch", "layout": "padded", "weight_decay": 0.0, "lr_restart": "never"},
        launch={"ranks": 1},
        student={"dropout": 0.0},
    )
    run = folder / "run"
    run.mkdir()
    path.write_text(f"plugins: [weights_plugin]\n{path.read_text()}")
    path.rename(run / "recipe.yaml")
    run_module("family_worker", "until-train", str(run))
    return run


def metrics(run: Path) -> list[dict[str, Any]]:
    records = read_metrics(run / "train" / "metrics.jsonl")
    assert len({record["stage"] for record in records}) == 2 and records[0]["sft_loss"] > 0
    return records


def assert_same_weights(actual: dict[str, torch.Tensor], run: Path) -> None:
    expected = load_file(run / "train" / "final" / "model.safetensors")
    # Adam turns a rounding error in a gradient near 0 into an update of about lr = 1e-3.
    errors = [float((actual[name] - value).abs().max()) for name, value in expected.items()]
    assert max(errors) < 2e-4


def digests(micro_batches: list[tuple[int, list[int]]], run: Path) -> list[str]:
    """The digest of the sample ids of each optimizer step, in the order of the plan's batch."""
    plan = load_plan(run / "plan" / "plan.json")
    split = TokenizedSplit.open(run / "data", "train")
    sampler = CurriculumSampler(plan, 42, micro_batch_size=plan.batch_size)
    values = []
    for number in range(plan.total_steps):
        (((batch,),)) = sampler.micro_batches(number)
        rows = [row for step, part in micro_batches if step == number for row in part]
        assert sorted(rows) == sorted(batch.tolist())
        values.append(StepPlan.ids_digest.fget(_Rows(split, batch)))
    return values


class _Rows:
    """What `StepPlan.ids_digest` reads."""

    def __init__(self, dataset: TokenizedSplit, rows: np.ndarray) -> None:
        self.dataset, self.rows = dataset, rows


@pytest.mark.parametrize("workers", [0, 2])
def test_transformers_trains_like_pocl(workers: int, run: Path, tmp_path: Path) -> None:
    trainer = make_trainer(run, tmp_path, dataloader_num_workers=workers)
    trainer.train()
    records = metrics(run)
    assert digests(trainer.micro_batches, run) == [r["sample_ids_digest"] for r in records]
    assert any(stage.weights is not None for stage in trainer.curriculum.sampler.plan.stages)
    losses = np.array(trainer.losses).reshape(len(records), -1).sum(1)
    np.testing.assert_allclose(losses, [record["loss"] for record in records], rtol=2e-5)
    assert_same_weights(dict(trainer.model.named_parameters()), run)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("stage", "temperature", "sft_ratio"):
        assert [entry[name] for entry in logged] == [record[name] for record in records]


def test_two_ranks_train_like_one(run: Path, tmp_path: Path) -> None:
    run_module("other_trainers", str(run), str(tmp_path), launcher=TWO_RANKS)
    assert_same_weights(load_file(tmp_path / "weights.safetensors"), run)
    # Each rank has the micro-batches that `pocl train` would give it.
    plan, split = load_plan(run / "plan" / "plan.json"), TokenizedSplit.open(run / "data", "train")
    for rank in (0, 1):
        sampler = CurriculumSampler(
            plan,
            42,
            micro_batch_size=MICRO_BATCH_SIZE,
            rank=rank,
            world_size=2,
            lengths=split.total_tokens,
        )
        actual = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert [row for _, part in actual for row in part] == list(sampler)


def test_mixed_precision_and_adapters(run: Path, tmp_path: Path) -> None:
    """Under bfloat16 autocast the losses are close to those of float32; a student with LoRA
    starts with the same loss, and only its adapters change.
    """
    peft = pytest.importorskip("peft")
    expected = [record["loss"] for record in metrics(run)]
    mixed = make_trainer(run, tmp_path, bf16=True)
    mixed.train()
    losses = np.array(mixed.losses).reshape(len(expected), -1).sum(1)
    assert (losses != expected).all()
    np.testing.assert_allclose(losses, expected, rtol=0.02)

    def adapt(student: Any) -> Any:
        return peft.get_peft_model(student, peft.LoraConfig(r=4, task_type="CAUSAL_LM"))

    adapted = make_trainer(run, tmp_path, adapt=adapt)
    before = {name: value.clone() for name, value in adapted.model.named_parameters()}
    adapted.train()
    losses = np.array(adapted.losses).reshape(len(expected), -1).sum(1)
    assert losses[0] == pytest.approx(expected[0], rel=2e-5)
    changed = {
        name
        for name, value in adapted.model.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if "lora_" in name}


class StopAfter(TrainerCallback):
    """Saves a checkpoint after some optimizer steps, and stops."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_save = control.should_training_stop = state.global_step == self.steps
        return control


def test_a_resumed_trainer_equals_an_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    """The checkpoint is in the middle of an epoch of the second stage."""
    whole = make_trainer(run, tmp_path / "whole")
    whole.train()
    stopped = make_trainer(run, tmp_path / "stopped")
    assert whole.curriculum.sampler.stage(5).index == 1
    stopped.add_callback(StopAfter(5))
    stopped.train()
    resumed = make_trainer(run, tmp_path / "stopped", dataloader_num_workers=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.micro_batches[0][0] == 5
    assert stopped.micro_batches + resumed.micro_batches == whole.micro_batches
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, resumed.model.get_parameter(name))

    other = make_trainer(run, tmp_path / "stopped")
    other.use_curriculum(other.curriculum.sampler.plan, seed=7, teacher=other.curriculum.teacher)
    with pytest.raises(ArtifactError, match="was trained by another plan or seed"):
        other.train(resume_from_checkpoint=True)


def test_a_plain_loop_gets_the_same_batches(run: Path) -> None:
    """Also through torchdata's StatefulDataLoader with workers, stopped and resumed."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    plan, split = load_plan(run / "plan" / "plan.json"), TokenizedSplit.open(run / "data", "train")

    def loader(kind: Any, workers: int = 0) -> Any:
        sampler = CurriculumSampler(plan, 42, micro_batch_size=MICRO_BATCH_SIZE)
        return kind(
            Samples(split),
            batch_size=MICRO_BATCH_SIZE,
            sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
        )

    batches = [batch["row"].tolist() for batch in loader(DataLoader)]
    micro_steps = plan.batch_size // MICRO_BATCH_SIZE
    assert len(batches) == plan.total_steps * micro_steps
    numbered = [(number // micro_steps, batch) for number, batch in enumerate(batches)]
    assert digests(numbered, run) == [r["sample_ids_digest"] for r in metrics(run)]
    for workers in (0, 2):
        first = loader(StatefulDataLoader, workers)
        iterator = iter(first)
        seen = [next(iterator)["row"].tolist() for _ in range(7)]
        state = first.state_dict()
        second = loader(StatefulDataLoader, workers)
        second.load_state_dict(state)
        assert seen + [batch["row"].tolist() for batch in second] == batches


def test_lightning_gets_the_batches_of_the_plan_and_resumes(tmp_path: Path) -> None:
    """The checkpoint is in the middle of the second stage; the weights are equal bit by bit."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    example = load_example("lightning_trainer")
    samples = example.make_samples(32)
    plan = example.make_plan(len(samples))

    class Recording(example.Distillation):
        def training_step(self, batch: Any, number: int) -> Any:
            rows = [
                next(row for row, sample in enumerate(samples) if torch.equal(sample["ids"], ids))
                for ids in batch["ids"]
            ]
            self.seen.append((self.trainer.global_step, rows))
            return super().training_step(batch, number)

    def train(checkpoint: Path | None = None, **arguments: Any) -> Any:
        sampler = CurriculumSampler(plan, seed=0, micro_batch_size=example.MICRO_BATCH)
        module = Recording(example.make_model(2, 1), example.make_model(3, 0), sampler)
        module.seen = []
        trainer = example.make_trainer(plan, str(tmp_path), enable_progress_bar=False, **arguments)
        # A checkpoint of Lightning holds more than tensors.
        kind = {"ckpt_path": str(checkpoint), "weights_only": False} if checkpoint else {}
        trainer.fit(module, example.make_loader(samples, sampler), **kind)
        return module

    whole = train()
    expected = [
        (step, part.tolist())
        for step in range(plan.total_steps)
        for part in whole.sampler.micro_batches(step)[0]
    ]
    assert whole.seen == expected and whole.sampler.stage(3).index == 1
    saving = ModelCheckpoint(tmp_path, filename="stopped", every_n_train_steps=3)
    stopped = train(max_steps=3, enable_checkpointing=True, callbacks=[saving])
    resumed = train(tmp_path / "stopped.ckpt")
    assert stopped.seen + resumed.seen == whole.seen and len(stopped.seen) == 6
    for value, other in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(value, other)


def load_example(name: str) -> Any:
    """A program in examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_contradicts_a_plan_is_refused(run: Path, tmp_path: Path) -> None:
    trainer = make_trainer(run, tmp_path)
    plan = trainer.curriculum.sampler.plan
    teacher = trainer.curriculum.teacher
    with pytest.raises(ModelError, match="divergence fkl needs a teacher"):
        trainer.use_curriculum(plan)
    trainer.use_curriculum(plan, divergence="sft")
    for name, value, message in (
        ("gradient_accumulation_steps", 3, "is not per_device_train_batch_size=2 times"),
        ("max_steps", 99, "max_steps=99 contradicts the plan's"),
        ("ignore_data_skip", True, "ignore_data_skip=True would change"),
    ):
        before = getattr(trainer.args, name)
        setattr(trainer.args, name, value)
        with pytest.raises(RecipeError, match=message):
            trainer.use_curriculum(plan, teacher=teacher)
        setattr(trainer.args, name, before)
    trainer.train_dataset = [trainer.train_dataset[0]] * 3
    with pytest.raises(RecipeError, match="and train_dataset has 3 rows"):
        trainer.use_curriculum(plan, teacher=teacher)
    trainer.train_dataset = Samples(TokenizedSplit.open(run / "data", "train"))
    with pytest.raises(RecipeError, match="unknown|there is no"):
        trainer.use_curriculum(plan, teacher=teacher, divergence="kl")
    with pytest.raises(RecipeError, match="adakd has no option 'strenght'"):
        trainer.use_curriculum(
            plan, teacher=teacher, token_rule="adakd", token_rule_options={"strenght": 1}
        )
