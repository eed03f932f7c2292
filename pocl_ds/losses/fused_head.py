"""Head and loss as one function: from hidden states at loss positions to loss sums, a chunk of
logits at a time.

Logits [tokens, ids] of teacher and student never exist as a whole. Each chunk's gradients with
respect to hidden states and head are computed in forward, while its logits are there; backward only
hands them on. A bare loop over chunks would save nothing, since autograd keeps every chunk until
backward.

Shapes: n loss tokens, d width of the student, d' of the teacher, v ids that take part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pocl_ds.data.batches import Batch
from pocl_ds.errors import RecipeError
from pocl_ds.losses.cross_tokenizer import OtherTokens, alm_weights, pairs, token_log_probs
from pocl_ds.losses.divergences import divergence_options, working_type
from pocl_ds.losses.token_losses import (
    BlockLoss,
    Buffers,
    LossTerms,
    TeacherHead,
    block_rows,
    row_bytes,
)
from pocl_ds.models.heads import Head, Mixture
from pocl_ds.models.vocab import Ids

# Sums over loss tokens: total = sft_ratio * CE + (1 - sft_ratio) * KD, which carries the gradient, then KD
# and CE for the log. A plain tuple, since ZeRO-3 looks for tensors to hook in tuples, lists and
# dictionaries only.
LossSums: TypeAlias = tuple[Tensor, Tensor, Tensor]


def loss_sums(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    terms: LossTerms,
    *,
    ids: Ids,
    teacher_hidden: Tensor | None = None,
    teacher_head: TeacherHead | None = None,
    chunk_bytes: int = 512 << 20,
) -> LossSums:
    """Loss sums over n tokens from hidden states and heads.

    hidden: [n, d] student; labels: [n] int64, ids that take part; teacher_hidden: [n, d'], no
    gradient, side by side for a `Mixture`, or the records [n, bytes] of a `TopK`, or [n] numbers of
    tokens for `OtherTokens`. n may be 0: the result is 0 and every parameter of the head still gets
    a (zero) gradient. Raises RecipeError where chunk_bytes holds no row.
    """
    widest = (
        max(ids.size, teacher_head.ids.size) if isinstance(teacher_head, OtherTokens) else ids.size
    )
    teachers = len(teacher_head.heads) if isinstance(teacher_head, Mixture) else 1
    sizes = chunk_sizes(terms.name, widest, chunk_bytes, hidden.dtype, hidden.device, teachers)
    if terms.name != "sft" and teacher_head is None:
        raise RecipeError(f"loss.name={terms.name} needs a teacher")
    if terms.name == "sft":
        teacher_hidden = teacher_head = None
    weights = kd = None
    if terms.name == "alm" and isinstance(teacher_head, OtherTokens):
        kd, weights = _span_weights(hidden, head, labels, terms, ids, teacher_head, sizes)
        teacher_hidden = teacher_head = None
    sums: LossSums = _HeadLoss.apply(
        hidden,
        head.weight,
        head.bias,
        head,
        labels,
        terms,
        ids,
        teacher_hidden,
        teacher_head,
        sizes,
        torch.is_grad_enabled(),
        weights,
    )
    if kd is None:
        return sums
    weighted, _, ce = sums
    value = terms.sft_ratio * ce + (1 - terms.sft_ratio) * kd
    return weighted + (value - weighted).detach(), kd, ce


def _span_weights(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    terms: LossTerms,
    ids: Ids,
    teacher: OtherTokens,
    sizes: ChunkSizes,
) -> tuple[Tensor, Tensor]:
    """See `alm_weights`: a first look at the logits, for the probabilities of spans, which each
    token's gradient needs.
    """
    rows = max(1, sizes.chunk // 2)
    ours = token_log_probs(hidden, labels, lambda part: ids.student_logits(head, part), rows)
    theirs = token_log_probs(
        teacher.hidden,
        teacher.labels,
        lambda part: teacher.ids.student_logits(teacher.head, part),
        rows,
    )
    return alm_weights(
        ours,
        theirs.to(ours.dtype),
        teacher.translated,
        temperature=terms.temperature,
        sft_ratio=terms.sft_ratio,
        factor=terms.kd_factor,
    )


@dataclass(frozen=True)
class ChunkSizes:
    """Rows of a chunk, whose logits of both sides are alive together, and of the blocks it is
    worked on in.
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
) -> ChunkSizes:
    """What fits a byte budget, for the divergence of this name over `size` ids. dtype: of the
    hidden states.

    Raises RecipeError where the budget does not hold one row.
    """
    kind = working_type(dtype)
    logits, worked = (1 + teachers) * size * dtype.itemsize, row_bytes(name, size, kind)
    if chunk_bytes < logits + worked:
        least = logits + worked
        raise RecipeError(
            f"loss.chunk_memory_mb={chunk_bytes} does not hold one token over {size} ids: give at "
            f"least {least}"
        )
    # Blocks get at most half of the budget: large chunks make fast matrix products.
    block = max(1, min(block_rows(size, kind, device), chunk_bytes // 2 // worked))
    return ChunkSizes((chunk_bytes - block * worked) // logits or 1, block)


def even_share(rows: int, most: int) -> int:
    """Rows of each of the fewest chunks that hold `rows`, at most so many: a small last chunk would
    be slow.
    """
    return max(1, -(-rows // max(1, -(-rows // most))))


class LossHead(nn.Module):
    """The student's head as a module that owns the head's parameters, so that ZeRO-3 gathers them
    for its forward.
    """

    def __init__(self, head: Head, ids: Ids, chunk_bytes: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.scale, self.soft_cap = head.scale, head.soft_cap
        self.size, self.chunk_bytes = ids.size, chunk_bytes
        self.rows = head.rows
        self.masked: Tensor | None
        self.register_buffer("masked", ids.masked, persistent=False)
        self.register_buffer("teacher_ids", ids.teacher_ids, persistent=False)
        self.register_buffer("teacher_masked", ids.teacher_masked, persistent=False)

    @contextlib.contextmanager
    def over_all_ids(self) -> Iterator[None]:
        """Inside, a softmax over every row of the head, as generation has it."""
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
        terms: LossTerms,
        teacher_hidden: Tensor | None,
        teacher_head: TeacherHead | None,
    ) -> LossSums:
        """See `loss_sums`; teacher_hidden is [m, d'] where the batch is translated for a teacher
        with other tokens.
        """
        asked = teacher_head
        if batch.translated and isinstance(teacher_head, Head) and teacher_hidden is not None:
            theirs = Ids(
                teacher_head.rows,
                self.teacher_masked if isinstance(self.teacher_masked, Tensor) else None,
            )
            asked = OtherTokens(
                teacher_hidden,
                teacher_head,
                theirs,
                batch.translated.batch.labels,
                batch.translated,
            )
            teacher_hidden = pairs(
                batch, batch.translated, by_position=bool(terms.options.get("by_position"))
            )
        head = Head(self.weight, self.bias, self.scale, self.soft_cap, self.rows)
        masked, teacher_ids = (
            part if isinstance(part, Tensor) else None for part in (self.masked, self.teacher_ids)
        )
        return loss_sums(
            hidden,
            head,
            batch.labels,
            terms,
            ids=Ids(self.size, masked, teacher_ids),
            teacher_hidden=teacher_hidden,
            teacher_head=asked,
            chunk_bytes=self.chunk_bytes,
        )


class _HeadLoss(torch.autograd.Function):
    """Gradients in forward, as in Liger's chunked losses; here for any divergence, head and mask."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        terms: LossTerms,
        ids: Ids,
        teacher_hidden: Tensor | None,
        teacher_head: TeacherHead | None,
        sizes: ChunkSizes,
        grad_enabled: bool,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind, rows = working_type(hidden.dtype), even_share(labels.numel(), sizes.chunk)
        sums = hidden.new_zeros(3, dtype=kind)
        # needs_input_grad does not know of torch.no_grad, and inside forward gradients are always
        # off.
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        gradients = _Gradients(hidden, weight, bias, ids.size, needs)
        block_loss = BlockLoss(
            terms,
            divergence_options(terms.name, terms.options),
            ids,
            (head, teacher_head),
            Buffers(min(sizes.block, rows), ids.size, kind, hidden.device),
            need_gradient=any(needs),
        )
        products, answers = (
            hidden.new_empty(rows, ids.size),
            _Answers(teacher_head, ids, rows, hidden),
        )
        for chunk in (slice(i, i + rows) for i in range(0, labels.numel(), rows)):
            part = hidden[chunk]
            product = head.product(part, ids.size, out=products[: len(part)])
            teacher = None if teacher_hidden is None else answers(teacher_hidden[chunk])
            sums += block_loss(
                product, teacher, labels[chunk], None if weights is None else weights[chunk]
            )
            gradients.add(chunk, product, part)
        ctx.gradients = (gradients.hidden, gradients.weight, gradients.bias)
        ctx.types = tuple(None if part is None else part.dtype for part in (hidden, weight, bias))
        total, kd, ce = sums.unbind()
        ctx.mark_non_differentiable(kd, ce)
        return total.clone(), kd.clone(), ce.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the fused head's gradients were handed on already: it has no second backward"
            )
        found = [  # in place: no tensor is larger than the head's gradient
            None if gradient is None else gradient.mul_(outer[0]).to(kind)
            for gradient, kind in zip(ctx.gradients, ctx.types, strict=True)
        ]
        ctx.gradients = None
        return (*found, *([None] * 9))


class _Answers:
    """What the teacher says of a chunk, in one buffer for all of them: products of its head, side
    by side for a `Mixture`; records and numbers of tokens are handed on as they are.
    """

    def __init__(self, head: TeacherHead | None, ids: Ids, rows: int, hidden: Tensor) -> None:
        self.head, self.ids = head, ids
        if isinstance(head, (Head, Mixture)):
            first, several = (
                (head, ()) if isinstance(head, Head) else (head.heads[0], (len(head.heads),))
            )
            kind = hidden.dtype if first.weight is None else first.weight.dtype
            self.buffer = hidden.new_empty(rows, *several, ids.size, dtype=kind)

    def __call__(self, states: Tensor) -> Tensor:
        if isinstance(self.head, Head):
            return self.ids.teacher_product(self.head, states, out=self.buffer[: len(states)])
        if isinstance(self.head, Mixture):
            for number, (one, own) in enumerate(
                zip(self.head.heads, self.head.parts(states), strict=True)
            ):
                self.buffer[: len(states), number] = self.ids.teacher_product(one, own)
            return self.buffer[: len(states)]
        return states


class _Gradients:
    """Of the sum in hidden states [n, d] and head, chunk by chunk; None where nobody needs one.

    Each chunk adds to the head's: in float32, or small chunks would drown in bfloat16's rounding.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        size: int,
        needs: Sequence[bool],
    ) -> None:
        """size: ids that take part, of the head's rows. needs: of hidden, weight and bias."""
        self.size, self.head, kind = size, weight, working_type(hidden.dtype)
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        if self.hidden is not None and weight is None:
            self.hidden[:, size:] = 0
        self.weight = (
            torch.empty_like(weight, dtype=kind) if weight is not None and needs[1] else None
        )
        if self.weight is not None:
            self.weight[size if len(hidden) else 0 :] = 0  # the first chunk writes the rest
        self.bias = torch.zeros_like(bias, dtype=kind) if bias is not None and needs[2] else None

    def add(self, chunk: slice, product: Tensor, part: Tensor) -> None:
        """product: the gradient in a chunk's products [rows, size]; part: its hidden states."""
        if self.hidden is not None and self.head is None:
            self.hidden[chunk, : self.size] = product
        elif self.hidden is not None and self.head is not None:
            torch.mm(product, self.head[: self.size], out=self.hidden[chunk])
        if self.weight is not None:
            _add_product(self.weight[: self.size], product, part, first=chunk.start == 0)
        if self.bias is not None:
            self.bias[: self.size] += product.sum(0, dtype=self.bias.dtype)


def _add_product(accumulated: Tensor, gradient: Tensor, part: Tensor, *, first: bool) -> None:
    """accumulated += gradient^T part, in the accumulator's type; the first one overwrites what is
    there.
    """
    if accumulated.dtype != gradient.dtype:
        product = torch.mm(gradient.T, part)
        _ = accumulated.copy_(product) if first else accumulated.add_(product)
    elif first:
        torch.mm(gradient.T, part, out=accumulated)
    else:
        accumulated.addmm_(gradient.T, part)
