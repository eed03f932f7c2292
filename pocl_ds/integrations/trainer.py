"""The curriculum as a mixin for the trainers of transformers and TRL (docs/method.md, eq. 4 to 9).

class CurriculumSFTTrainer(CurriculumTrainerMixin, SFTTrainer):
    pass

trainer = CurriculumSFTTrainer(model=student, args=args, train_dataset=dataset)
trainer.use_curriculum(plan, seed=42, teacher=teacher)
trainer.train()
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from pocl_ds.curriculum.data_sampler import CurriculumSampler
from pocl_ds.curriculum.plan import Plan
from pocl_ds.errors import ArtifactError, ModelError, RecipeError
from pocl_ds.losses.divergences import divergence_options
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.fused_inputs import DEFAULT_CHUNK_BYTES
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.heads import hidden_states, output_head
from pocl_ds.models.vocab import VocabMap

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

IGNORED = -100  # the label of a token that does not train
STATE_FILE = "curriculum.json"  # in a checkpoint


@dataclass
class Curriculum:
    """What `CurriculumTrainerMixin.use_curriculum` sets up."""

    sampler: CurriculumSampler
    teacher: Any | None
    divergence: str
    options: dict[str, Any]
    scale_by_temperature_squared: bool
    vocab: VocabMap | None
    chunk_bytes: int

    def terms(self, step: int) -> LossTerms:
        """The loss of an optimizer step."""
        stage = self.sampler.stage(step)
        return LossTerms(
            self.divergence,
            stage.temperature,
            stage.sft_ratio,
            self.scale_by_temperature_squared,
            self.options,
        )


class CurriculumTrainerMixin(Trainer):
    """Batches, temperature, SFT ratio and loss of a curriculum in a transformers or TRL trainer.

    Put it before the trainer's class, and call `use_curriculum` before `train`. Training then takes
    as many optimizer steps as the plan has. `resume_from_checkpoint` continues anywhere in it.

    With labels in the batch (`Trainer`, `SFTTrainer`, `GKDTrainer`) the loss is that of
    `fused_linear_distillation_loss`, a mean over the loss tokens of the optimizer step, without the
    full logits. TRL's `DistillationTrainer` generates its responses and keeps its own loss, at the
    temperature of the stage.
    """

    curriculum: Curriculum | None = None
    _rows_per_batch: int = 0  # of the data loader on one rank

    def use_curriculum(
        self,
        plan: Plan,
        *,
        seed: int = 42,
        teacher: Any | None = None,
        divergence: str = "fkl",
        scale_by_temperature_squared: bool = True,
        vocab: VocabMap | None = None,
        lengths: NDArray[np.int64] | None = None,
        chunk_memory_mb: float = DEFAULT_CHUNK_BYTES / 2**20,
        **options: Any,
    ) -> None:
        """Train by a plan whose order holds rows of `train_dataset`.

        Args:
            plan: from `build_plan`, or `single_stage_plan` for plain KD.
            seed: of the shuffle within each epoch.
            teacher: a causal language model; by default the trainer's `teacher_model`.
            divergence, options: see `pocl_ds.losses.divergence`; `sft` needs no teacher.
            vocab: ids that take part; by default those that both output heads have.
            lengths: tokens of each dataset row, so that samples of similar length share a batch.
            chunk_memory_mb: memory for logits and buffers of the loss.

        Raises:
            RecipeError: a setting of the trainer contradicts the plan.
            ModelError: a model whose head is unknown or sharded, or no teacher.
        """
        args = self.args
        if args.gradient_accumulation_steps * args.train_batch_size * args.world_size != (
            plan.batch_size
        ):
            raise RecipeError(
                f"the plan's batch_size={plan.batch_size} is not per_device_train_batch_size="
                f"{args.per_device_train_batch_size} times gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} times {args.world_size} processes: change one"
            )
        if args.max_steps > 0 and args.max_steps != plan.total_steps:
            raise RecipeError(
                f"max_steps={args.max_steps} contradicts the plan's {plan.total_steps} optimizer "
                "steps: leave max_steps out"
            )
        for name in ("packing", "padding_free", "ignore_data_skip"):
            if getattr(args, name, False):
                raise RecipeError(f"{name}=True would change the plan's batches: leave it out")
        if self.accelerator.split_batches or self.accelerator.dispatch_batches:
            raise RecipeError(
                "split_batches and dispatch_batches of accelerate would change the plan's "
                "batches: leave them out"
            )
        rows: Any = self.train_dataset
        needed = int(np.max(plan.stages[-1].order)) + 1
        if rows is None or len(rows) < needed:
            raise RecipeError(
                f"the plan's order names dataset row {needed - 1}, and train_dataset has "
                f"{0 if rows is None else len(rows)} rows: build the plan from the scores of this "
                "dataset"
            )
        if any(stage.weights is not None for stage in plan.stages):
            raise RecipeError(
                "the plan has sample weights, which these trainers do not apply: build it without "
                "sample_weights, or with weights of 0 and 1"
            )
        if self._generates and any(stage.sft_ratio for stage in plan.stages):
            raise RecipeError(
                "this trainer trains on responses that the student generates, and SFT on them "
                "teaches nothing: build the plan with sft_ratio=(0, 0)"
            )
        teacher = teacher if teacher is not None else getattr(self, "teacher_model", None)
        if teacher is None and divergence != "sft":
            raise ModelError(
                f"the divergence {divergence} needs a teacher: pass teacher=, or divergence='sft'"
            )
        if teacher is not None and not self._generates:
            teacher = teacher.eval().requires_grad_(False).to(args.device)
        if not self._generates:
            self._check_models(teacher)

        self.curriculum = Curriculum(
            CurriculumSampler(
                plan,
                seed,
                micro_batch_size=args.train_batch_size,
                rank=args.process_index,
                world_size=args.world_size,
                lengths=lengths,
            ),
            teacher,
            divergence,
            divergence_options(divergence, options),
            scale_by_temperature_squared,
            vocab,
            int(chunk_memory_mb * 2**20),
        )
        args.max_steps = plan.total_steps
        if not self._generates:
            # The trainer then counts the loss tokens of an optimizer step, and does not divide the
            # loss by the number of its micro-batches.
            self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    @property
    def _generates(self) -> bool:
        """Whether the trainer generates its responses by itself, as `DistillationTrainer` does."""
        return hasattr(self, "_generate_and_score_completions")

    def _check_models(self, teacher: Any | None) -> None:
        """Raise ModelError for a model that the loss cannot split into backbone and head."""
        for model in (self._student, teacher):
            if model is not None:
                output_head(_without_adapters(model))
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ModelError(
                "the curriculum's loss needs complete weights on every rank, and this trainer "
                "shards them with DeepSpeed or FSDP: train with `pocl train`, which shards both "
                "models, or without sharding"
            )

    @property
    def _student(self) -> Any:
        return _without_adapters(self.accelerator.unwrap_model(self.model))

    def train(self, resume_from_checkpoint: str | bool | None = None, **arguments: Any) -> Any:
        """See `transformers.Trainer`. Raises ArtifactError for a checkpoint of another plan."""
        if self.curriculum is not None and resume_from_checkpoint:
            folder = resume_from_checkpoint
            if folder is True:
                folder = get_last_checkpoint(str(self.args.output_dir))
            self._check_checkpoint(folder)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)

    def _check_checkpoint(self, folder: Any) -> None:
        path = Path(str(folder)) / STATE_FILE
        if folder and not (path.is_file() and json.loads(path.read_text()) == self._identity()):
            raise ArtifactError(
                f"the checkpoint {folder} was trained by another plan or seed, or by none: "
                "continue with its plan, or start from the beginning"
            )

    def _identity(self) -> dict[str, Any]:
        assert self.curriculum is not None
        return self.curriculum.sampler.identity

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        super()._save_checkpoint(*arguments, **named)
        if self.curriculum is not None and self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            (folder / STATE_FILE).write_text(json.dumps(self._identity()))

    def _get_dataloader(self, *arguments: Any, **named: Any) -> Any:
        if named.get("is_training"):
            self._rows_per_batch = named["batch_size"]
        return super()._get_dataloader(*arguments, **named)

    def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
        if self.curriculum is None:
            return super()._get_train_sampler(*arguments, **named)
        repeats = self._rows_per_batch // self.args.train_batch_size
        return AllRanksSampler(self.curriculum.sampler, repeats)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of the current stage; in evaluation that of the trainer."""
        if self.curriculum is None or not self.model.training or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        terms = self.curriculum.terms(self.state.global_step)
        if self._generates:
            self.temperature = terms.temperature
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        student = self.accelerator.unwrap_model(model)
        total = _call_through(model, student, self._loss_sum, inputs, terms)
        count = num_items_in_batch
        if count is None:
            count = (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
            count = count * self.current_gradient_accumulation_steps
        elif self.args.average_tokens_across_devices:
            total = total * self.accelerator.num_processes  # the gradients of ranks are averaged
        return total / count

    def _loss_sum(self, inputs: Mapping[str, Tensor], terms: LossTerms) -> Tensor:
        """The sum of the loss over the loss tokens of a micro-batch."""
        curriculum = self.curriculum
        assert curriculum is not None
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = inputs.get("attention_mask")
        ids, mask, labels = _pad_right(ids, torch.ones_like(ids) if mask is None else mask, labels)
        trains = labels[:, 1:] != IGNORED
        with self.accelerator.autocast():
            hidden = hidden_states(self._student, ids, mask)[:, :-1][trains]
        head = output_head(self._student)
        teacher_hidden = teacher_head = None
        rows = head.rows
        if curriculum.teacher is not None and terms.name != "sft":
            teacher = _without_adapters(self.accelerator.unwrap_model(curriculum.teacher))
            teacher_head = output_head(teacher)
            rows = min(rows, teacher_head.rows)
            with torch.no_grad(), self.accelerator.autocast():
                teacher_hidden = hidden_states(teacher, ids, mask)[:, :-1][trains]
            assert teacher_head.weight is not None
            teacher_hidden = teacher_hidden.to(teacher_head.weight.dtype)
        assert head.weight is not None
        total, _, _ = loss_sums(
            hidden.to(head.weight.dtype),
            head,
            labels[:, 1:][trains],
            terms,
            vocab=(curriculum.vocab or VocabMap(rows)).to(ids.device),
            teacher_hidden=teacher_hidden,
            teacher_head=teacher_head,
            chunk_bytes=curriculum.chunk_bytes,
        )
        return total

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        """See `transformers.Trainer`; adds the stage and its values."""
        if self.curriculum is not None and "loss" in logs:
            stage = self.curriculum.sampler.stage(max(self.state.global_step - 1, 0))
            logs = {
                **logs,
                "stage": stage.index,
                "temperature": stage.temperature,
                "sft_ratio": stage.sft_ratio,
            }
        super().log(logs, *arguments, **named)


class AllRanksSampler:
    """The rows of all ranks, so that accelerate, which gives every rank each `world_size`-th batch
    of the data loader, gives each rank its own.

    repeats: micro-batches of one rank in a batch of the data loader. A trainer that generates loads
    those of an optimizer step together, once for each micro-step.
    """

    def __init__(self, sampler: CurriculumSampler, repeats: int) -> None:
        self.sampler, self.repeats = sampler, repeats

    def __len__(self) -> int:
        return self.sampler.plan.total_steps * self.sampler.plan.batch_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        for step in range(self.sampler.plan.total_steps):
            batches = self.sampler.micro_batches(step)
            for first in range(0, len(batches[0]), self.repeats):
                rows = [
                    row
                    for rank in batches
                    for micro_batch in rank[first : first + self.repeats]
                    for row in micro_batch.tolist()
                ]
                yield from rows * self.repeats


def _without_adapters(model: Any) -> Any:
    """The causal language model inside a PEFT model, whose layers contain the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _call_through(
    wrapper: Any, module: nn.Module, function: Callable[..., Tensor], *arguments: Any
) -> Tensor:
    """Call `function` in place of the module's forward, so that DistributedDataParallel, which may
    wrap it, takes part.
    """
    forward = module.forward

    def redirected(*inner: Any) -> Tensor:
        module.forward = forward
        return function(*inner)

    module.forward = redirected
    result: Tensor = wrapper(*arguments)
    return result


def _pad_right(ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the padding of each row to its end. All are [B, T]."""
    order = mask.bool().long().argsort(dim=1, descending=True, stable=True)
    ids, mask, labels = (tensor.gather(1, order) for tensor in (ids, mask, labels))
    return ids, mask, labels.masked_fill(mask == 0, IGNORED)
