"""Output head and distillation loss on plain tensors, as a function and as a module.

The arguments have the names and the order of Liger Kernel's fused linear losses. The complete
logits [tokens, ids] of student and teacher are never in memory; see `fused_head`.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from pocl_ds.losses.divergences import divergence_options
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.token_rules import TokenRule
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap


def fused_linear_distillation_loss(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor | None,
    teacher_weight: Tensor | None,
    true_labels: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    sample_weights: Tensor | None = None,
    divergence: str = "fkl",
    temperature: float = 1.0,
    sft_ratio: float = 0.0,
    scale_by_temperature_squared: bool = True,
    token_rule: str | None = None,
    token_rule_options: dict[str, Any] | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_memory_mb: float = 512,
    **options: Any,
) -> Tensor:
    """sft_ratio CE + (1 - sft_ratio) temperature^2 D from hidden states and heads (docs/method.md,
    eq. 9 and 27), in nats, as a scalar.

    student_input: [..., d], hidden states of the student, each of which predicts its label;
    student_weight: [ids, d]; student_bias: [ids]. teacher_input: [..., d'], teacher_weight:
    [teacher_ids, d'], teacher_bias: [teacher_ids], all without a gradient, or None for
    `divergence="sft"`. If the two heads have different numbers of rows, the ids that both have take
    part in the softmax. true_labels: [...] int64, already shifted; tokens with ignore_index do not
    count. Its last dimension holds the tokens of one sample. sample_weights: a factor of each
    sample's loss, [B] for true_labels [B, T]; the mean still divides by the number of tokens.

    divergence and options: see `pocl_ds.losses.divergence`. token_rule and token_rule_options: a
    rule for the temperature and the weight of each token; see `losses.token_rules`. reduction: mean
    or sum over the tokens that count. chunk_memory_mb: memory for logits and buffers; more is
    faster. Gradients are computed in the forward pass, so that the result allows one backward pass.

    Raises RecipeError for an unknown divergence, rule or option, a value out of range, weights
    without one number per sample, or a memory budget that does not hold one token; NumericalError
    for a plugin's rule whose factors are invalid.
    """
    if (teacher_input is None) != (teacher_weight is None):
        raise ValueError("give both teacher_input and teacher_weight, or neither")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: choose mean or sum")
    # Select the tokens that count.
    counts = true_labels != ignore_index
    labels, sample_of_token = true_labels[counts], _sample_of_token(counts)
    teacher_hidden = None if teacher_input is None else teacher_input.detach()[counts]
    # The ids that both heads have take part.
    teacher_head, ids = None, len(student_weight)
    if teacher_weight is not None:
        bias, ids = teacher_bias, min(ids, len(teacher_weight))
        bias = None if bias is None else bias.detach()
        teacher_head = OutputHead(teacher_weight.detach(), bias, 1.0, None)
    total, _, _ = loss_sums(
        student_input[counts],
        OutputHead(student_weight, student_bias, 1.0, None),
        labels,
        LossTerms(
            divergence,
            temperature,
            sft_ratio,
            scale_by_temperature_squared,
            options,
            None if token_rule is None else TokenRule.of(token_rule, token_rule_options or {}),
        ),
        vocab=VocabMap(ids),
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        sample_of_token=sample_of_token,
        sample_weights=sample_weights,
        chunk_bytes=int(chunk_memory_mb * 2**20),
    )
    return total / max(len(labels), 1) if reduction == "mean" else total


def _sample_of_token(counts: Tensor) -> Tensor:
    """The sample of each token that counts [n]. counts: [..., T] bool, a row for each sample."""
    rows = counts.reshape(-1, counts.shape[-1]) if counts.ndim else counts.reshape(1, 1)
    return rows.nonzero()[:, 0]


class FusedLinearDistillationLoss(nn.Module):
    """`fused_linear_distillation_loss` with its settings fixed at construction.

    It has no parameters: forward gets the heads' weights. Raises RecipeError for an unknown
    divergence, rule or option, or a value out of range.
    """

    def __init__(
        self,
        divergence: str = "fkl",
        *,
        temperature: float = 1.0,
        sft_ratio: float = 0.0,
        scale_by_temperature_squared: bool = True,
        token_rule: str | None = None,
        token_rule_options: dict[str, Any] | None = None,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum"] = "mean",
        chunk_memory_mb: float = 512,
        **options: Any,
    ) -> None:
        super().__init__()
        self.divergence, self.options = divergence, divergence_options(divergence, options)
        self.temperature, self.sft_ratio = temperature, sft_ratio
        self.scale_by_temperature_squared = scale_by_temperature_squared
        self.token_rule, self.token_rule_options = token_rule, token_rule_options or {}
        if token_rule is not None:
            self.token_rule_options = TokenRule.of(token_rule, self.token_rule_options).options
        self.ignore_index, self.reduction = ignore_index, reduction
        self.chunk_memory_mb = chunk_memory_mb

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor | None,
        teacher_weight: Tensor | None,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        *,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss as a scalar; see `fused_linear_distillation_loss`."""
        return fused_linear_distillation_loss(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            true_labels,
            student_bias,
            teacher_bias,
            sample_weights=sample_weights,
            divergence=self.divergence,
            temperature=self.temperature,
            sft_ratio=self.sft_ratio,
            scale_by_temperature_squared=self.scale_by_temperature_squared,
            token_rule=self.token_rule,
            token_rule_options=self.token_rule_options,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            chunk_memory_mb=self.chunk_memory_mb,
            **self.options,
        )
