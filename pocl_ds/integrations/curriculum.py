"""What a trainer of another library trains by: the batches of a plan, and the loss of each
micro-batch (docs/method.md, eq. 4 to 9 and 28 to 31).

Shapes: B samples of a micro-batch, T tokens with padding, n loss tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pocl_ds.curriculum.data_sampler import CurriculumSampler
from pocl_ds.errors import RecipeError
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.token_rules import TokenRule
from pocl_ds.models.heads import hidden_states, output_head
from pocl_ds.models.vocab import VocabMap

IGNORED = -100  # the label of a token that does not train


@dataclass
class Curriculum:
    """A plan and its loss, on one rank.

    teacher: None for a trainer that computes its own loss, and for SFT. options: of the
    divergence. vocab: ids that take part; None for those that both output heads have.
    """

    sampler: CurriculumSampler
    teacher: Any | None
    divergence: str
    options: dict[str, Any]
    scale_by_temperature_squared: bool
    token_rule: TokenRule | None
    vocab: VocabMap | None
    chunk_bytes: int
    _step: int = field(default=-1, init=False)
    _micro_step: int = field(default=0, init=False)

    def terms(self, step: int) -> LossTerms:
        """The loss of an optimizer step."""
        stage = self.sampler.stage(step)
        return LossTerms(
            self.divergence,
            stage.temperature,
            stage.sft_ratio,
            self.scale_by_temperature_squared,
            self.options,
            self.token_rule,
        )

    def next_weights(self, step: int) -> Tensor | None:
        """The sample weights [B] of the next micro-batch of an optimizer step: call it once for
        each. None if all are 1.
        """
        self._micro_step = self._micro_step + 1 if step == self._step else 0
        self._step = step
        weights = self.sampler.sample_weights(step, self._micro_step)
        return None if weights is None else torch.from_numpy(weights)

    def loss_sum(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        inputs: Mapping[str, Tensor],
        terms: LossTerms,
        sample_weights: Tensor | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Tensor:
        """The sum of the loss over the loss tokens of a micro-batch.

        inputs: `input_ids` and `labels`, [B, T], and `attention_mask` if there is padding. Raises
        RecipeError if the batch has another number of samples than weights.
        """
        # Loss tokens of all samples, with the padding at the end of each.
        ids, labels = inputs["input_ids"], inputs["labels"]
        if sample_weights is not None and len(ids) != len(sample_weights):
            raise RecipeError(
                f"the data collator returned {len(ids)} samples for the plan's "
                f"{len(sample_weights)}, and sample weights need one for each: keep all samples"
            )
        mask = inputs.get("attention_mask")
        ids, mask, labels = _pad_right(ids, torch.ones_like(ids) if mask is None else mask, labels)
        trains = labels[:, 1:] != IGNORED

        # Hidden states of both models.
        with autocast():
            hidden = hidden_states(student, ids, mask)[:, :-1][trains]
        head = output_head(student)
        teacher_hidden = teacher_head = None
        rows = head.rows
        if teacher is not None and terms.name != "sft":
            teacher_head = output_head(teacher)
            rows = min(rows, teacher_head.rows)
            with torch.no_grad(), autocast():
                teacher_hidden = hidden_states(teacher, ids, mask)[:, :-1][trains]
            assert teacher_head.weight is not None
            teacher_hidden = teacher_hidden.to(teacher_head.weight.dtype)

        # Head and loss.
        assert head.weight is not None
        total, _, _ = loss_sums(
            hidden.to(head.weight.dtype),
            head,
            labels[:, 1:][trains],
            terms,
            vocab=(self.vocab or VocabMap(rows)).to(ids.device),
            teacher_hidden=teacher_hidden,
            teacher_head=teacher_head,
            sample_of_token=trains.nonzero()[:, 0],
            sample_weights=sample_weights,
            chunk_bytes=self.chunk_bytes,
        )
        return total


def _pad_right(ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the padding of each row to its end. All are [B, T]."""
    order = mask.bool().long().argsort(dim=1, descending=True, stable=True)
    ids, mask, labels = (tensor.gather(1, order) for tensor in (ids, mask, labels))
    return ids, mask, labels.masked_fill(mask == 0, IGNORED)
