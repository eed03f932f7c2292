"""Output head and loss as one function: from hidden states at loss positions to loss sums, one
chunk of logits at a time.

The complete logits [tokens, ids] of teacher and student are never in memory. The gradients of a
chunk in its hidden states and in the head are computed in the forward pass, while its logits are
in memory, and the backward pass only returns them (docs/method.md, eq. 27; the technique of Liger
Kernel, arXiv 2410.10989). A plain loop over chunks would save nothing, because autograd stores
every chunk until the backward pass.

Shapes: n loss tokens, d width of the student, d' of the teacher, v ids that take part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pocl_ds.data.batches import Batch
from pocl_ds.losses.cross_tokenizer import (
    CrossTokenizerTeacher,
    paired_teacher_tokens,
)
from pocl_ds.losses.divergences import compute_dtype
from pocl_ds.losses.fused_inputs import DEFAULT_CHUNK_BYTES, FusedLossInputs
from pocl_ds.losses.head_products import HeadGradients, TeacherProducts
from pocl_ds.losses.sample_losses import SampleLosses, SampleTerms, sample_losses
from pocl_ds.losses.token_inputs import TokenInputs
from pocl_ds.losses.token_losses import (
    LossTerms,
    TeacherHead,
)
from pocl_ds.losses.triton_loss import (
    padded_size,
)
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap

# Sums over loss tokens: the total loss, which carries the gradient, then the divergence and the
# cross-entropy for the log. A plain tuple, because ZeRO-3 looks for tensors to hook only in tuples,
# lists and dictionaries.
LossSums: TypeAlias = tuple[Tensor, Tensor, Tensor]


def even_chunk(rows: int, limit: int) -> int:
    """The chunk size that splits `rows` evenly into as few chunks of at most `limit` rows as
    possible: a small last chunk would be slow.
    """
    return max(1, -(-rows // max(1, -(-rows // limit))))


def loss_sums(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    terms: LossTerms,
    *,
    vocab: VocabMap,
    teacher_hidden: Tensor | None = None,
    teacher_head: TeacherHead | None = None,
    sample_of_token: Tensor | None = None,
    sample_weights: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> LossSums:
    """Loss sums over n tokens from hidden states and heads (docs/method.md, eq. 9).

    hidden: [n, d], student; labels: [n] int64, ids that take part; teacher_hidden: [n, d']
    without a gradient, concatenated along d' for a `HeadMixture`, or [n, bytes] records of a
    `RecordCodec`, or [n] token indices for a `CrossTokenizerTeacher`. n may be 0: the sums are 0
    and every parameter of the head still gets a (zero) gradient. sample_of_token: [n] int64, the
    sample of each token, in order; None: all are of one sample. sample_weights: [B], factors of
    the samples' losses in the total; the divergence and the cross-entropy stay without them.

    Raises RecipeError if chunk_bytes does not hold one row, if a divergence has no teacher, for
    weights without one number per sample, or for a token rule without the teacher's logits; and
    NumericalError for a plugin's rule whose factors are invalid.
    """
    dtype, with_position = compute_dtype(hidden.dtype), terms.token_rule is not None
    tokens = TokenInputs.of_samples(
        labels, sample_of_token, sample_weights, dtype, with_position=with_position
    )
    inputs = FusedLossInputs.of(
        hidden, head, tokens, terms, vocab, teacher_hidden, teacher_head, chunk_bytes
    )
    sums: LossSums = FusedHeadLoss.apply(hidden, head.weight, head.bias, inputs)
    return sums


class LossHead(nn.Module):
    """The student's output head and loss as a module that owns the head's parameters, so that
    ZeRO-3 gathers them for its forward.
    """

    def __init__(self, head: OutputHead, vocab: VocabMap, chunk_bytes: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.scale, self.soft_cap, self.rows = head.scale, head.soft_cap, head.rows
        self.size, self.chunk_bytes = vocab.size, chunk_bytes
        self.masked: Tensor | None
        self.teacher_ids: Tensor | None
        self.teacher_masked: Tensor | None
        self.register_buffer("masked", vocab.masked, persistent=False)
        self.register_buffer("teacher_ids", vocab.teacher_ids, persistent=False)
        self.register_buffer("teacher_masked", vocab.teacher_masked, persistent=False)

    @contextlib.contextmanager
    def over_all_ids(self) -> Iterator[None]:
        """Within the block the softmax covers every row of the head, as in generation."""
        size, masked = self.size, self.masked
        self.size, self.masked = self.rows, None
        try:
            yield
        finally:
            self.size, self.masked = size, masked

    def forward(
        self,
        hidden: Tensor,
        batch: Batch,
        terms: LossTerms | SampleTerms,
        teacher_hidden: Tensor | None,
        teacher_head: TeacherHead | None,
    ) -> LossSums | SampleLosses:
        """See `loss_sums`, or `sample_losses` with `SampleTerms`. teacher_hidden is [m, d'] if the
        batch has a view for a teacher with another tokenizer.
        """
        if isinstance(terms, SampleTerms):
            return sample_losses(
                hidden,
                OutputHead(self.weight, self.bias, self.scale, self.soft_cap, self.rows),
                batch.labels,
                batch.sample_of_token,
                len(batch.rows),
                terms,
                vocab=VocabMap(self.size, self.masked, self.teacher_ids),
                teacher_hidden=teacher_hidden,
                teacher_head=teacher_head,
                chunk_bytes=self.chunk_bytes,
            )
        view = batch.teacher_view
        if view and isinstance(teacher_head, OutputHead) and teacher_hidden is not None:
            vocab = VocabMap(teacher_head.rows, self.teacher_masked)
            teacher_head = CrossTokenizerTeacher(
                teacher_hidden, teacher_head, vocab, view.batch.labels, view
            )
            by_position = bool(terms.options.get("by_position"))
            teacher_hidden = paired_teacher_tokens(batch, view, by_position=by_position)
        tokens = TokenInputs.of_samples(
            batch.labels,
            batch.sample_of_token,
            batch.sample_weights,
            compute_dtype(hidden.dtype),
            token_weights=batch.token_weights,
            with_position=terms.token_rule is not None,
            positions=batch.token_positions,
        )
        # The head is assembled here: ZeRO-3 has gathered its parameters only within this forward.
        inputs = FusedLossInputs.of(
            hidden,
            OutputHead(self.weight, self.bias, self.scale, self.soft_cap, self.rows),
            tokens,
            terms,
            VocabMap(self.size, self.masked, self.teacher_ids),
            teacher_hidden,
            teacher_head,
            self.chunk_bytes,
        )
        sums: LossSums = FusedHeadLoss.apply(hidden, self.weight, self.bias, inputs)
        return sums


class FusedHeadLoss(torch.autograd.Function):
    """Gradients in the forward pass, as in Liger's chunked losses, for any divergence, head and
    mask.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        inputs: FusedLossInputs,
    ) -> LossSums:
        """Loss sums over n tokens; the gradients stay in ctx until the backward pass."""
        tokens, spans, size = inputs.tokens, inputs.spans, inputs.vocab.size
        rule, ce_weight = inputs.terms.token_rule, inputs.terms.ce_weight
        dtype, rows = compute_dtype(hidden.dtype), even_chunk(len(tokens), inputs.sizes.chunk)

        # Memory that all chunks share: gradients, products of both heads, buffers of the blocks.
        block_size = min(inputs.sizes.block, rows)
        needs_grad = [inputs.grad_enabled and flag for flag in ctx.needs_input_grad[:3]]
        gradients = HeadGradients(hidden, weight, bias, size, needs_grad)
        stride = padded_size(size) if inputs.in_kernel else size
        products = hidden.new_empty(rows, stride)[:, :size]
        teacher_products = TeacherProducts(inputs.teacher_head, inputs.vocab, rows, stride, hidden)
        logit_loss = inputs.logit_loss(block_size, dtype, need_gradient=any(needs_grad))

        sums = hidden.new_zeros(inputs.terms.num_sums(tokens), dtype=dtype)
        for chunk in (slice(i, i + rows) for i in range(0, len(tokens), rows)):
            # The products of this chunk's hidden states with the student's and the teacher's head.
            student = inputs.head.product(hidden[chunk], size, out=products[: len(hidden[chunk])])
            teacher = None
            if inputs.teacher_hidden is not None:
                teacher = teacher_products(inputs.teacher_hidden[chunk])
            # Loss and gradient in the products, one block at a time.
            for start in range(0, len(student), block_size):
                block = slice(start, start + block_size)
                sums += logit_loss(
                    student[block],
                    None if teacher is None else teacher[block],
                    tokens[chunk][block],
                )
            # From the gradient in the products to those in hidden states and head.
            gradients.add(chunk, student, hidden[chunk])

        ctx.gradients = (gradients.hidden, gradients.weight, gradients.bias)
        ctx.types = tuple(None if part is None else part.dtype for part in (hidden, weight, bias))
        if spans is not None:
            sums[::2] = spans.kd[: len(sums) // 2]
        if rule is not None and rule.is_checked:
            rule.raise_invalid(sums[4:])
        kd, ce = sums[0].clone(), sums[1].clone()
        weighted_kd, weighted_ce = sums[:2] if len(sums) == 2 else sums[2:4]
        total = ce_weight * weighted_ce + (1 - ce_weight) * weighted_kd
        ctx.mark_non_differentiable(kd, ce)
        return total, kd, ce

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the forward pass, times the outer one."""
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of the fused head were returned already: call backward only once"
            )
        # In place: no tensor is larger than the head's gradient.
        scaled = [
            None if gradient is None else gradient.mul_(outer[0]).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.types, strict=True)
        ]
        ctx.gradients = None
        return (*scaled, None)
