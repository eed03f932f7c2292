"""The curriculum in Lightning: its batches, temperature, SFT ratio, sample weights and loss.

Teacher and student are tiny models with random weights, and the samples are random tokens; put
your own in their place.

    pip install pocl_ds lightning torchdata
    python examples/lightning_trainer.py
"""

from __future__ import annotations

from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from pocl_ds.curriculum import CurriculumSampler, Plan, build_plan
from pocl_ds.losses import fused_linear_distillation_loss

MICRO_BATCH, VOCABULARY = 4, 128


class Distillation(lightning.LightningModule):
    """Distils a teacher by a plan. The loss of an optimizer step is the mean of its micro-batches'
    means over their tokens.
    """

    def __init__(
        self,
        student: LlamaForCausalLM,
        teacher: LlamaForCausalLM,
        sampler: CurriculumSampler,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.student, self.sampler, self.lr = student, sampler, lr
        self.frozen = [teacher.eval().requires_grad_(False)]  # in a list: not in checkpoints
        self.micro_steps = sampler.rows_per_step // sampler.micro_batch_size

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        """The loss of one micro-batch. number: of the micro-batch, from the start of the plan."""
        step, micro_step = divmod(number, self.micro_steps)
        stage, weights = self.sampler.stage(step), self.sampler.sample_weights(step, micro_step)
        ids, labels = batch["ids"], batch["labels"]
        teacher = self.frozen[0].to(self.device)
        with torch.no_grad():
            teacher_states = teacher.model(ids).last_hidden_state[:, :-1]
        self.log_dict(
            {"stage": float(stage.index), "temperature": stage.temperature}, prog_bar=True
        )
        return fused_linear_distillation_loss(
            self.student.model(ids).last_hidden_state[:, :-1],
            self.student.lm_head.weight,
            teacher_states,
            teacher.lm_head.weight,
            labels[:, 1:],
            sample_weights=None if weights is None else torch.from_numpy(weights),
            divergence="fkl",
            temperature=stage.temperature,
            sft_ratio=stage.sft_ratio,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with a constant learning rate."""
        return torch.optim.AdamW(self.student.parameters(), lr=self.lr)


def make_model(layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def make_samples(count: int) -> list[dict[str, Tensor]]:
    """Samples of 16 tokens, of which the first 6 are the prompt."""
    ids = torch.randint(VOCABULARY, (count, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = -100
    return [{"ids": row, "labels": target} for row, target in zip(ids, labels, strict=True)]


def make_plan(samples: int) -> Plan:
    """Two stages over an order of samples; `rank_by_difficulty` gives one from scores."""
    order = np.random.default_rng(0).permutation(samples)
    weights = np.linspace(0.5, 1.5, samples, dtype=np.float32)
    return build_plan(
        order, num_subsets=2, epochs_per_stage=1, batch_size=8, sample_weights=weights
    )


def make_trainer(plan: Plan, folder: str | None = None, **arguments: Any) -> lightning.Trainer:
    """One epoch of Lightning is the whole plan."""
    return lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=plan.batch_size // MICRO_BATCH,
        use_distributed_sampler=False,  # the sampler knows the ranks
        logger=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, **arguments},
    )


def make_loader(samples: list[dict[str, Tensor]], sampler: CurriculumSampler) -> StatefulDataLoader:
    """A loader whose state, and so that of the sampler, is in Lightning's checkpoints."""
    return StatefulDataLoader(samples, batch_size=MICRO_BATCH, sampler=sampler)


def main() -> None:
    samples = make_samples(32)
    plan = make_plan(len(samples))
    # With several ranks: rank=trainer.global_rank, world_size=trainer.world_size.
    sampler = CurriculumSampler(plan, seed=0, micro_batch_size=MICRO_BATCH)
    module = Distillation(make_model(2, 1), make_model(3, 0), sampler)
    trainer = make_trainer(plan)
    trainer.fit(module, make_loader(samples, sampler))
    print(f"{trainer.global_step} of {plan.total_steps} optimizer steps")


if __name__ == "__main__":
    main()
