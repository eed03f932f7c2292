"""TRL's trainers with the curriculum, on tiny models; also their ranks.

launch/train.sh --ranks R --module trl_trainers STUDENT TEACHER OUT

trains with each of them, and writes OUT/KIND-R.json with the rows of each micro-batch and
OUT/KIND.safetensors.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from other_trainers import save_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_ds.curriculum import build_plan
from pocl_ds.integrations import CurriculumTrainerMixin

KINDS = ("sft", "gkd", "distillation")
SAMPLES, BATCH, MICRO_BATCH = 24, 4, 2
RECORDS = [
    {"prompt": f"Say {n} and {n * n % 17}.", "completion": f" It is {n}" * (1 + n % 4)}
    for n in range(SAMPLES)
]


def make_trainer(kind: str, student: Path, teacher: Path, out: Path) -> Any:
    """A trainer over two stages. It records (optimizer step, inputs) of each micro-batch as `seen`;
    one that generates records the prompts of each optimizer step.
    """
    import trl
    from trl.experimental import gkd

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    common = {
        "use_cpu": True,
        "ddp_backend": "gloo" if world_size > 1 else None,
        "report_to": "none",
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": BATCH // (MICRO_BATCH * world_size),
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    base, config, fields = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, {}),
        "gkd": (gkd.GKDTrainer, gkd.GKDConfig, {"lmbda": 0.0}),
        "distillation": (
            trl.DistillationTrainer,
            trl.DistillationConfig,
            {"max_completion_length": 4},
        ),
    }[kind]
    teacher_model = AutoModelForCausalLM.from_pretrained(teacher)
    trainer = recording(base)(
        model=AutoModelForCausalLM.from_pretrained(student),
        args=config(str(out), **common, **fields),
        train_dataset=Dataset.from_list(records_of(kind)),
        processing_class=AutoTokenizer.from_pretrained(student),
        **({} if kind == "sft" else {"teacher_model": teacher_model}),
    )
    trainer.seen, trainer.temperatures = [], []
    plan = build_plan(
        np.random.default_rng(0).permutation(SAMPLES),
        num_subsets=2,
        epochs_per_stage=1,
        batch_size=BATCH,
        sft_ratio=(0.0, 0.0) if kind == "distillation" else (0.3, 0.0),
    )
    trainer.use_curriculum(plan, seed=3, **({"teacher": teacher_model} if kind == "sft" else {}))
    return trainer


def recording(base: type) -> type:
    """A trainer's class with the curriculum, which records what it trains on."""

    class Recording(CurriculumTrainerMixin, base):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            if not self._generates:
                copies = {name: value.clone() for name, value in inputs.items()}
                self.seen.append((self.state.global_step, copies))
            return super().compute_loss(model, inputs, *rest, **named)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            self.seen.append((self.state.global_step, [row["prompt"] for row in inputs]))
            return super()._generate_and_score_completions(inputs)

        def _compute_loss(self, *arguments: Any) -> Any:
            self.temperatures.append(self.temperature)
            return super()._compute_loss(*arguments)

    if not hasattr(base, "_generate_and_score_completions"):
        del Recording._generate_and_score_completions, Recording._compute_loss
    return Recording


def records_of(kind: str) -> list[dict[str, Any]]:
    """The records in the form that the trainer reads."""
    if kind == "distillation":
        return [{"prompt": record["prompt"]} for record in RECORDS]
    if kind == "sft":
        return RECORDS
    return [
        {
            "messages": [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["completion"]},
            ]
        }
        for record in RECORDS
    ]


def rows_seen(trainer: Any) -> list[tuple[int, list[int]]]:
    """The optimizer step and the dataset rows of what the trainer recorded."""
    rows = []
    for step, seen in trainer.seen:
        texts: Sequence[str] = seen
        if isinstance(seen, dict):
            decode = trainer.processing_class.decode
            pairs = zip(seen["input_ids"], seen["attention_mask"], strict=True)
            texts = [decode(ids[mask.bool()]) for ids, mask in pairs]
        matches = [re.search(r"Say (\d+) and", text) for text in texts]
        rows.append((step, [int(match[1]) for match in matches if match]))
    return rows


def main(student: Path, teacher: Path, out: Path) -> None:
    """Train with each trainer on this rank."""
    for kind in KINDS:
        trainer = make_trainer(kind, student, teacher, out / kind)
        trainer.train()
        rank = trainer.args.process_index
        (out / f"{kind}-{rank}.json").write_text(json.dumps(rows_seen(trainer)))
        if rank == 0:
            save_weights(trainer, out / f"{kind}.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
