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

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pocl_ds.errors import RecipeError
from pocl_ds.losses.cross_tokenizer import (
    CrossTokenizerTeacher,
    SpanLoss,
    alm_span_loss,
    label_log_probs,
)
from pocl_ds.losses.divergences import compute_dtype, divergence_options
from pocl_ds.losses.head_products import HeadGradients, TeacherProducts
from pocl_ds.losses.token_inputs import TokenInputs
from pocl_ds.losses.token_losses import (
    Buffers,
    EagerLoss,
    LogitLoss,
    LossTerms,
    TeacherHead,
    block_rows,
    row_bytes,
)
from pocl_ds.losses.triton_loss import (
    TritonLoss,
    kernel_obstacle,
    log_implementation,
    padded_size,
)
from pocl_ds.models.heads import HeadMixture, OutputHead
from pocl_ds.models.vocab import VocabMap

# Sums over loss tokens: the total loss, which carries the gradient, then the divergence and the
# cross-entropy for the log. A plain tuple, because ZeRO-3 looks for tensors to hook only in tuples,
# lists and dictionaries.
LossSums: TypeAlias = tuple[Tensor, Tensor, Tensor]

DEFAULT_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class ChunkSizes:
    """Rows of a chunk, whose logits of both sides are in memory together, and of the blocks it is
    processed in.
    """

    chunk: int
    block: int


def chunk_sizes(
    name: str,
    size: int,
    chunk_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    teachers: int = 1,
    in_kernel: bool = False,
) -> ChunkSizes:
    """The chunk and block sizes that fit a memory budget, for the divergence of this name over
    `size` ids. dtype: of the hidden states. in_kernel: the loss runs in a Triton kernel, which
    needs no buffers and takes a chunk as one block.

    Raises RecipeError if the budget does not hold one row.
    """
    working = compute_dtype(dtype)
    logit_bytes = (1 + teachers) * (padded_size(size) if in_kernel else size) * dtype.itemsize
    buffer_bytes = 0 if in_kernel else row_bytes(name, size, working)
    if chunk_bytes < logit_bytes + buffer_bytes:
        raise RecipeError(
            f"loss.chunk_memory_mb: {chunk_bytes} bytes do not hold one token over {size} ids; "
            f"give at least {logit_bytes + buffer_bytes} bytes"
        )
    if in_kernel:
        return ChunkSizes(chunk_bytes // logit_bytes, chunk_bytes // logit_bytes)
    # Blocks get at most half of the budget: large chunks make fast matrix products.
    block = max(1, min(block_rows(size, working, device), chunk_bytes // 2 // buffer_bytes))
    return ChunkSizes((chunk_bytes - block * buffer_bytes) // logit_bytes or 1, block)


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


@dataclass(frozen=True)
class FusedLossInputs:
    """Inputs of the fused loss other than the tensors that get a gradient."""

    head: OutputHead
    tokens: TokenInputs
    terms: LossTerms
    options: dict[str, Any]  # of the divergence, with defaults
    vocab: VocabMap
    teacher_hidden: Tensor | None
    teacher_head: TeacherHead | None
    sizes: ChunkSizes
    in_kernel: bool  # whether the loss runs in a Triton kernel
    spans: SpanLoss | None
    grad_enabled: bool  # in an autograd.Function's forward gradients are always off

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        head: OutputHead,
        tokens: TokenInputs,
        terms: LossTerms,
        vocab: VocabMap,
        teacher_hidden: Tensor | None,
        teacher_head: TeacherHead | None,
        chunk_bytes: int,
    ) -> FusedLossInputs:
        """Check the arguments, choose how the loss is computed, and the chunk sizes. See
        `loss_sums`.
        """
        options = divergence_options(terms.name, terms.options)
        if terms.name != "sft" and teacher_head is None:
            raise RecipeError(f"loss.name={terms.name} needs a teacher")
        if terms.token_rule and not isinstance(teacher_head, (OutputHead, HeadMixture)):
            raise RecipeError(
                f"the token rule {terms.token_rule.name} needs the logits of teachers with the "
                f"student's tokens, which loss.name={terms.name} with this teacher does not give"
            )
        # ALM becomes a weighted cross-entropy, which needs no teacher in the chunks.
        in_spans = terms.name == "alm" and isinstance(teacher_head, CrossTokenizerTeacher)
        chunk_head = None if terms.name == "sft" or in_spans else teacher_head
        obstacle = kernel_obstacle(terms.name, options, hidden, chunk_head)
        log_implementation(terms.name, obstacle)
        # Chunks must fit the wider head and every teacher.
        widest, teachers = vocab.size, 1
        if isinstance(teacher_head, CrossTokenizerTeacher):
            widest = max(vocab.size, teacher_head.vocab.size)
        if isinstance(teacher_head, HeadMixture):
            teachers = len(teacher_head.heads)
        sizes = chunk_sizes(
            terms.name, widest, chunk_bytes, hidden.dtype, hidden.device, teachers, obstacle is None
        )
        spans = None
        if in_spans and isinstance(teacher_head, CrossTokenizerTeacher):
            spans = _span_loss(hidden, head, tokens, terms, vocab, teacher_head, sizes)
            tokens = replace(tokens, span_weights=spans.token_weights)
        return cls(
            head,
            tokens,
            terms,
            options,
            vocab,
            None if chunk_head is None else teacher_hidden,
            chunk_head,
            sizes,
            obstacle is None,
            spans,
            torch.is_grad_enabled(),
        )

    def logit_loss(self, block_size: int, dtype: torch.dtype, *, need_gradient: bool) -> LogitLoss:
        """What computes the loss of up to `block_size` tokens. dtype: of the computation."""
        arguments = (self.terms, self.options, self.vocab, self.head)
        if self.in_kernel:
            assert self.teacher_head is None or isinstance(self.teacher_head, OutputHead)
            return TritonLoss(*arguments, self.teacher_head, need_gradient)
        buffers = Buffers(block_size, self.vocab.size, dtype, self.tokens.labels.device)
        return EagerLoss(*arguments, self.teacher_head, buffers, need_gradient)


def _span_loss(
    hidden: Tensor,
    head: OutputHead,
    tokens: TokenInputs,
    terms: LossTerms,
    vocab: VocabMap,
    teacher: CrossTokenizerTeacher,
    sizes: ChunkSizes,
) -> SpanLoss:
    """A first pass over the logits, for the probabilities of spans that each token's gradient
    needs.
    """
    # Beside the logits there are a copy in float32 and its logarithms.
    rows = max(1, sizes.chunk // 3)
    student_log_probs = label_log_probs(
        hidden, tokens.labels, lambda part: vocab.student_logits(head, part), rows
    )
    teacher_log_probs = label_log_probs(
        teacher.hidden,
        teacher.labels,
        lambda part: teacher.vocab.student_logits(teacher.head, part),
        rows,
    )
    return alm_span_loss(
        student_log_probs,
        teacher_log_probs.to(student_log_probs.dtype),
        teacher.view,
        tokens.weights,
        temperature=terms.temperature,
        sft_ratio=terms.sft_ratio,
        factor=terms.kd_factor,
    )


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
