"""The curriculum in the trainers of transformers and TRL, and in a plain loop: the batches, losses
and weights of `pocl train`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import ROOT, environment
from other_trainers import Samples, collate, make_trainer
from safetensors.torch import load_file
from tiny_runs import write_recipe
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainerCallback

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
    """A run that trained with plain PyTorch."""
    folder = tmp_path_factory.mktemp("other-trainers")
    path = write_recipe(
        folder,
        tiny_llama_untied,
        tiny_llama,
        max_train_samples=24,
        ranking={"strategy": "random"},
        curriculum={"num_subsets": 2, "epochs_per_stage": 2, "sft_ratio": [0.5, 0.2]},
        train={"engine": "torch", "layout": "padded", "weight_decay": 0.0, "lr_restart": "never"},
        launch={"ranks": 1},
        student={"dropout": 0.0},
    )
    run = folder / "run"
    run.mkdir()
    path.rename(run / "recipe.yaml")
    run_module("family_worker", "until-train", str(run))
    return run


def run_module(name: str, *arguments: str, launcher: tuple[str, ...] = ()) -> None:
    """Run a module of tests/ in a process of its own: training leaves process groups behind."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [*launcher, "--module"] if launcher else [sys.executable, "-m"]
    process = subprocess.run(
        [*command, name, *arguments],
        env={**environment(), "POCL_PYTHON": sys.executable, "PYTHONPATH": paths},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]


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
    losses = np.array(trainer.losses).reshape(len(records), -1).sum(1)
    np.testing.assert_allclose(losses, [record["loss"] for record in records], rtol=2e-5)
    assert_same_weights(dict(trainer.model.named_parameters()), run)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("stage", "temperature", "sft_ratio"):
        assert [entry[name] for entry in logged] == [record[name] for record in records]


def test_two_ranks_train_like_one(run: Path, tmp_path: Path) -> None:
    launcher = ("bash", str(ROOT / "launch" / "train.sh"), "--ranks", "2", "--threads", "1")
    run_module("other_trainers", str(run), str(tmp_path), launcher=launcher)
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
    with pytest.raises(RecipeError, match="unknown|there is no"):
        trainer.train_dataset = Samples(TokenizedSplit.open(run / "data", "train"))
        trainer.use_curriculum(plan, teacher=teacher, divergence="kl")


# SFTTrainer, GKDTrainer and DistillationTrainer


@pytest.fixture(scope="module")
def texts() -> list[dict[str, str]]:
    return [
        {"prompt": f"Say {n} and {n * n % 17}.", "completion": f" It is {n}" * (1 + n % 4)}
        for n in range(24)
    ]


def trl_trainer(kind: str, models: tuple[Path, Path], texts: Any, out: Path) -> Any:
    trl = pytest.importorskip("trl")  # needs Python 3.11
    from datasets import Dataset as Rows
    from transformers import AutoTokenizer
    from trl.experimental import gkd

    from pocl_ds.curriculum import build_plan
    from pocl_ds.integrations import CurriculumTrainerMixin

    common = {
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    bases = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, {}),
        "gkd": (gkd.GKDTrainer, gkd.GKDConfig, {"lmbda": 0.0}),
        "distillation": (
            trl.DistillationTrainer,
            trl.DistillationConfig,
            {"max_completion_length": 4},
        ),
    }
    base, config, fields = bases[kind]
    trainer_class = type("CurriculumTrainer", (CurriculumTrainerMixin, base), {})
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in models)
    if kind == "gkd":
        texts = [
            {
                "messages": [
                    {"role": "user", "content": text["prompt"]},
                    {"role": "assistant", "content": text["completion"]},
                ]
            }
            for text in texts
        ]
    elif kind == "distillation":
        texts = [{"prompt": text["prompt"]} for text in texts]
    named = {} if kind == "sft" else {"teacher_model": teacher}
    trainer = trainer_class(
        model=student,
        args=config(str(out), **common, **fields),
        train_dataset=Rows.from_list(texts),
        processing_class=tokenizer,
        **named,
    )
    order = np.random.default_rng(0).permutation(len(texts))
    plan = build_plan(
        order,
        num_subsets=2,
        epochs_per_stage=1,
        batch_size=4,
        sft_ratio=(0.0, 0.0) if kind == "distillation" else (0.3, 0.0),
    )
    trainer.use_curriculum(plan, seed=3, **({"teacher": teacher} if kind == "sft" else {}))
    return trainer


@pytest.mark.parametrize("kind", ["sft", "gkd"])
def test_trl_trains_like_a_plain_loop(
    kind: str, texts: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """Against full logits and autograd over the same batches."""
    import tiny_models

    teacher_path = tiny_models.llama(tmp_path / "teacher", seed=1)
    trainer = trl_trainer(kind, (tiny_llama, teacher_path), texts, tmp_path / "out")
    seen: list[tuple[int, dict[str, torch.Tensor]]] = []
    compute = trainer.compute_loss

    def record(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        seen.append((trainer.state.global_step, {k: v.clone() for k, v in inputs.items()}))
        return compute(model, inputs, *rest, **named)

    trainer.compute_loss = record
    trainer.train()
    sampler = trainer.curriculum.sampler
    assert len(seen) == 2 * sampler.plan.total_steps
    # The batches are those of the plan.
    decode = trainer.processing_class.decode
    for step, inputs in seen:
        expected = {texts[row]["prompt"] for part in sampler.micro_batches(step)[0] for row in part}
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            text = decode(ids[mask.bool()])
            assert any(prompt in text for prompt in expected), (text, expected)

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path).double() for path in (tiny_llama, teacher_path)
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    for step in range(sampler.plan.total_steps):
        stage, losses, tokens = sampler.stage(step), [], 0
        for inputs in (inputs for number, inputs in seen if number == step):
            for ids, mask, labels in zip(
                inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True
            ):
                ids, labels = ids[mask.bool()][None], labels[mask.bool()]
                trains = labels[1:] != -100
                tokens += int(trains.sum())
                logits = student(input_ids=ids).logits[0, :-1][trains]
                with torch.no_grad():
                    target = teacher(input_ids=ids).logits[0, :-1][trains]
                p, q = ((x / stage.temperature).log_softmax(-1) for x in (target, logits))
                kd = stage.temperature**2 * (p.exp() * (p - q)).sum()
                ce = torch.nn.functional.cross_entropy(logits, labels[1:][trains], reduction="sum")
                losses.append(stage.sft_ratio * ce + (1 - stage.sft_ratio) * kd)
        (sum(losses) / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = dict(trainer.model.named_parameters())
    for name, value in student.named_parameters():
        torch.testing.assert_close(trained[name].double(), value, rtol=1e-4, atol=2e-6)


def test_trl_generates_for_the_prompts_of_the_plan(
    texts: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    import tiny_models

    teacher = tiny_models.llama(tmp_path / "teacher", seed=1)
    trainer = trl_trainer("distillation", (tiny_llama, teacher), texts, tmp_path / "out")
    seen: list[tuple[int, float, list[str]]] = []
    generate = trainer._generate_and_score_completions

    def record(inputs: Any) -> Any:
        seen.append((trainer.state.global_step, [row["prompt"] for row in inputs]))
        return generate(inputs)

    temperatures: list[float] = []
    compute = trainer._compute_loss

    def record_temperature(*arguments: Any) -> Any:
        temperatures.append(trainer.temperature)
        return compute(*arguments)

    trainer._generate_and_score_completions = record
    trainer._compute_loss = record_temperature
    trainer.train()
    sampler = trainer.curriculum.sampler
    assert [step for step, _ in seen] == list(range(sampler.plan.total_steps))
    for step, prompts in seen:
        rows = [row for part in sampler.micro_batches(step)[0] for row in part]
        assert prompts == [texts[row]["prompt"] for row in rows]
    assert temperatures == [
        sampler.stage(step).temperature for step in range(sampler.plan.total_steps) for _ in "12"
    ]
    assert {temperatures[0], temperatures[-1]} == {1.0, 2.0}
