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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from pocl_ds.curriculum.data_sampler import CurriculumSampler
from pocl_ds.curriculum.plan import Plan
from pocl_ds.errors import ArtifactError, ModelError
from pocl_ds.integrations.checks import check_arguments, check_models, check_own_loss
from pocl_ds.integrations.curriculum import IGNORED, Curriculum
from pocl_ds.losses.divergences import divergence_options
from pocl_ds.losses.fused_inputs import DEFAULT_CHUNK_BYTES
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.token_rules import TokenRule
from pocl_ds.models.vocab import VocabMap

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

STATE_FILE = "curriculum.json"  # in a checkpoint


class CurriculumTrainerMixin(Trainer):
    """Batches, temperature, SFT ratio and loss of a curriculum in a transformers or TRL trainer.

    Put it before the trainer's class, and call `use_curriculum` before `train`. Training then takes
    as many optimizer steps as the plan has. `resume_from_checkpoint` continues anywhere in it.

    With labels in the batch (`Trainer`, `SFTTrainer`, `GKDTrainer`) the loss is that of
    `fused_linear_distillation_loss` with the plan's sample weights, a mean over the loss tokens of
    the optimizer step, without the full logits. TRL's `DistillationTrainer` generates its responses
    and keeps its own loss, at the temperature of the stage.
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
        token_rule: str | None = None,
        token_rule_options: dict[str, Any] | None = None,
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
            token_rule, token_rule_options: temperature and weight of each token, see
                `pocl_ds.losses.fused_linear_distillation_loss`.
            vocab: ids that take part; by default those that both output heads have.
            lengths: tokens of each dataset row, so that samples of similar length share a batch.
            chunk_memory_mb: memory for logits and buffers of the loss.

        Raises:
            RecipeError: a setting of the trainer contradicts the plan, or a name, option or value
                is unknown or out of range.
            ModelError: a model whose head is unknown or sharded, or no teacher.
        """
        # Refuse what contradicts the plan.
        args = self.args
        check_arguments(self, plan)
        if self._generates:
            check_own_loss(plan, has_token_rule=token_rule is not None)
        teacher = teacher if teacher is not None else getattr(self, "teacher_model", None)
        if teacher is None and divergence != "sft":
            raise ModelError(
                f"the divergence {divergence} needs a teacher: pass teacher=, or divergence='sft'"
            )
        if not self._generates:
            check_models(self, self._student, _without_adapters(teacher))
            if teacher is not None:
                teacher = teacher.eval().requires_grad_(False).to(args.device)

        # Batches and loss.
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
            None if token_rule is None else TokenRule.of(token_rule, token_rule_options or {}),
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

        student, curriculum = self.accelerator.unwrap_model(model), self.curriculum
        weights = curriculum.next_weights(self.state.global_step)
        total = _call_through(model, student, self._loss_sum, inputs, terms, weights)
        count = num_items_in_batch
        if count is None:
            count = (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
            count = count * self.current_gradient_accumulation_steps
        elif self.args.average_tokens_across_devices:
            total = total * self.accelerator.num_processes  # the gradients of ranks are averaged
        return total / count

    def _loss_sum(
        self, inputs: Mapping[str, Tensor], terms: LossTerms, weights: Tensor | None
    ) -> Tensor:
        """See `Curriculum.loss_sum`."""
        curriculum = self.curriculum
        assert curriculum is not None
        teacher = curriculum.teacher
        if teacher is not None:
            teacher = _without_adapters(self.accelerator.unwrap_model(teacher))
        return curriculum.loss_sum(
            self._student, teacher, inputs, terms, weights, self.accelerator.autocast
        )

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
