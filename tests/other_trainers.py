"""Trainers of transformers and TRL that walk the plan of a run; also their ranks.

launch/train.sh --ranks R --module other_trainers RUN OUT

writes OUT/rank-R.json with the rows of each micro-batch, and OUT/weights.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from pocl_ds.config.recipe_file import load_recipe
from pocl_ds.curriculum.plan_step import load_plan
from pocl_ds.curriculum.schedules import learning_rate
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.integrations import CurriculumTrainerMixin


class CurriculumTrainer(CurriculumTrainerMixin, Trainer):
    """The plain trainer of transformers. It records the rows of each micro-batch, and the loss."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        self.micro_batches.append((self.state.global_step, inputs.pop("row").tolist()))
        loss = super().compute_loss(model, inputs, *rest, **named)
        self.losses.append(float(loss.detach()))
        return loss


class Samples(Dataset[dict[str, Any]]):
    """The training samples of a run, with their labels."""

    def __init__(self, split: TokenizedSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> dict[str, Any]:
        ids = torch.from_numpy(self.split.tokens(row).astype("int64"))
        labels = torch.where(torch.from_numpy(self.split.loss_mask(row)), ids, -100)
        return {"input_ids": ids, "labels": labels, "row": row}


def collate(samples: Sequence[dict[str, Any]], *, side: str = "left") -> dict[str, torch.Tensor]:
    """Pad to the longest sample. Left is the harder side."""

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [sample[name] for sample in samples],
            batch_first=True,
            padding_value=value,
            padding_side=side,
        )

    mask = [{"mask": torch.ones_like(sample["input_ids"])} for sample in samples]
    samples = [{**sample, **ones} for sample, ones in zip(samples, mask, strict=True)]
    return {
        "input_ids": pad("input_ids", 0),
        "labels": pad("labels", -100),
        "attention_mask": pad("mask", 0),
        "row": torch.tensor([sample["row"] for sample in samples]),
    }


def make_trainer(
    run: Path, out: Path, *, adapt: Callable[[Any], Any] = lambda student: student, **arguments: Any
) -> CurriculumTrainer:
    """A trainer with the models, plan, optimizer and learning rates of a run's recipe. adapt:
    changes the student.
    """
    # The plan holds the weights of the plugin's rule, whose name is not registered here.
    recipe = load_recipe(str(run / "recipe.yaml"), ["plugins=[]", "curriculum.sample_weights=null"])
    train, plan = recipe.train, load_plan(run / "plan" / "plan.json")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (recipe.student.model, recipe.teacher.model)
    )
    student, split = adapt(student), TokenizedSplit.open(run / "data", "train")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        str(out),
        use_cpu=True,
        ddp_backend="gloo" if world_size > 1 else None,
        report_to="none",
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.batch_size // (train.micro_batch_size * world_size),
        max_grad_norm=train.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        **arguments,
    )
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=0
    )
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            learning_rate(step, plan.total_steps, lr=train.lr, min_lr=train.min_lr) / train.lr
        ),
    )
    trainer = CurriculumTrainer(
        student,
        args,
        train_dataset=Samples(split),
        data_collator=collate,
        optimizers=(optimizer, rates),
    )
    trainer.micro_batches, trainer.losses = [], []
    assert recipe.loss.token_rule
    trainer.use_curriculum(
        plan,
        seed=recipe.seed,
        teacher=teacher,
        token_rule=recipe.loss.token_rule.name,
        lengths=split.total_tokens,
        chunk_memory_mb=1,
    )
    return trainer


def main(run: Path, out: Path) -> None:
    """Train on this rank."""
    trainer = make_trainer(run, out)
    trainer.train()
    rank = trainer.args.process_index
    (out / f"rank-{rank}.json").write_text(json.dumps(trainer.micro_batches))
    if rank == 0:
        save_weights(trainer, out / "weights.safetensors")


def save_weights(trainer: Any, path: Path) -> None:
    """Save the trained student."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    save_file({name: value.detach().clone() for name, value in model.named_parameters()}, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
