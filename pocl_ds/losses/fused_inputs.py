"""Inputs of the fused head and loss: checks, the choice of implementation, and chunk sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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
