"""Head and loss as one function: from hidden states at loss positions to loss sums, a chunk of logits at a time.

Logits [tokens, ids] of teacher and student never exist as a whole. Each chunk's gradients with respect to hidden states
and head are computed in forward, while its logits are there; backward only hands them on. A bare loop over chunks would
save nothing, since autograd keeps every chunk until backward.

Shapes: n loss tokens, d width of the student, d' of the teacher, v ids that take part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pocl_ds.distill.closed_forms import CLOSED
from pocl_ds.distill.divergences import FUNCTIONS, MASKED, divergence_options, working_type
from pocl_ds.errors import RecipeError
from pocl_ds.models.heads import Head
from pocl_ds.models.vocabulary import Ids

# Rows of v numbers alive at once while a chunk is worked on: log-probabilities of both sides and one's probabilities, what
# logsumexp and the mixture need, the gradient of the cross-entropy; through autograd twice as many.
ROWS_ALIVE, ROWS_ALIVE_AUTOGRAD = 6, 12


@dataclass(frozen=True)
class LossTerms:
    """What the loss of one step is made of: alpha * CE + (1 - alpha) * KD at temperature tau (METHOD 3)."""

    name: str
    tau: float = 1.0
    alpha: float = 0.0
    tau_squared: bool = True
    options: dict[str, Any] = field(default_factory=dict)


# Sums over loss tokens: total = alpha * CE + (1 - alpha) * KD, which carries the gradient, then KD and CE for the log. A
# plain tuple, since ZeRO-3 looks for tensors to hook in tuples, lists and dictionaries only.
LossSums: TypeAlias = tuple[Tensor, Tensor, Tensor]


def loss_sums(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    terms: LossTerms,
    *,
    ids: Ids,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    chunk_bytes: int = 256 << 20,
) -> LossSums:
    """Loss sums over n tokens from hidden states and heads.

    hidden: [n, d] student; labels: [n] int64, ids that take part; teacher_hidden: [n, d'], no gradient. n may be 0: the
    result is 0 and every parameter of the head still gets a (zero) gradient. Raises RecipeError where chunk_bytes holds
    no row.
    """
    rows = chunk_rows(terms.name, ids.size, chunk_bytes, working_type(hidden))
    if terms.name != "sft" and (teacher_hidden is None or teacher_head is None):
        raise RecipeError(f"loss.name={terms.name} needs a teacher")
    sums: LossSums = _HeadLoss.apply(
        hidden, head.weight, head.bias, head, labels, terms, ids, teacher_hidden, teacher_head, rows, torch.is_grad_enabled()
    )
    return sums


def chunk_rows(name: str, size: int, chunk_bytes: int, dtype: torch.dtype) -> int:
    """Tokens of one chunk within a byte budget, for the divergence of this name."""
    row = size * dtype.itemsize * (ROWS_ALIVE if name in CLOSED or name == "sft" else ROWS_ALIVE_AUTOGRAD)
    if chunk_bytes < row:
        raise RecipeError(f"loss.chunk_bytes={chunk_bytes} does not hold one token over {size} ids: give at least {row}")
    return chunk_bytes // row


class LossHead(nn.Module):
    """The student's head as a module that owns the head's parameters, so that ZeRO-3 gathers them for its forward."""

    def __init__(self, head: Head, ids: Ids, chunk_bytes: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.scale, self.soft_cap = head.scale, head.soft_cap
        self.size, self.chunk_bytes = ids.size, chunk_bytes
        self.register_buffer("masked", ids.masked, persistent=False)
        self.register_buffer("teacher_ids", ids.teacher_ids, persistent=False)

    def forward(
        self, hidden: Tensor, labels: Tensor, terms: LossTerms, teacher_hidden: Tensor | None, teacher_head: Head | None
    ) -> LossSums:
        """See `loss_sums`."""
        head = Head(weight=self.weight, bias=self.bias, scale=self.scale, soft_cap=self.soft_cap)
        masked, teacher_ids = (part if isinstance(part, Tensor) else None for part in (self.masked, self.teacher_ids))
        return loss_sums(
            hidden,
            head,
            labels,
            terms,
            ids=Ids(self.size, masked, teacher_ids),
            teacher_hidden=teacher_hidden,
            teacher_head=teacher_head,
            chunk_bytes=self.chunk_bytes,
        )


class _HeadLoss(torch.autograd.Function):
    """Gradients in forward, as in Liger's chunked losses; here for any divergence, head and mask."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        terms: LossTerms,
        ids: Ids,
        teacher_hidden: Tensor | None,
        teacher_head: Head | None,
        rows: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = divergence_options(terms.name, terms.options)
        kind = working_type(hidden)
        sums = hidden.new_zeros(3, dtype=kind)
        # needs_input_grad does not know of torch.no_grad, and inside forward gradients are always off.
        need_hidden, need_weight, need_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        # Each chunk adds to the head's gradient: float32, or small chunks would drown in bfloat16's rounding.
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.empty_like(weight, dtype=kind) if need_weight else None
        if grad_weight is not None:
            grad_weight[ids.size if labels.numel() else 0 :] = 0  # the first chunk writes the rest
        grad_bias = torch.zeros_like(bias, dtype=kind) if bias is not None and need_bias else None
        kept = weight[: ids.size]
        for chunk in (slice(i, i + rows) for i in range(0, labels.numel(), rows)):
            part = hidden[chunk]
            product = head.product(part, ids.size)
            teacher = None
            if teacher_hidden is not None and teacher_head is not None and terms.name != "sft":
                teacher = ids.teacher_logits(teacher_head, teacher_hidden[chunk])
            need = need_hidden or need_weight
            chunk_sums, gradient = _chunk(product, labels[chunk], teacher, head, terms, options, ids, need)
            sums += chunk_sums
            if gradient is None:
                continue
            if grad_hidden is not None:
                torch.mm(gradient, kept, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight[: ids.size], gradient, part, first=chunk.start == 0)
            if grad_bias is not None:
                grad_bias[: ids.size] += gradient.sum(0, dtype=kind)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.types = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        total, kd, ce = sums.unbind()
        ctx.mark_non_differentiable(kd, ce)
        return total.clone(), kd.clone(), ce.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused head's gradients were handed on already: it has no second backward")
        found = [
            None if gradient is None else gradient.mul_(outer[0]).to(kind)  # in place: a copy of the head's is the largest there is
            for gradient, kind in zip(ctx.gradients, ctx.types, strict=True)
        ]
        ctx.gradients = None
        return (*found, *([None] * 8))


def _chunk(
    product: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    head: Head,
    terms: LossTerms,
    options: dict[str, Any],
    ids: Ids,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums (total, kd, ce) of one chunk and the gradient of total with respect to hidden x head [rows, v].

    product and teacher are the caller's own and may be overwritten.
    """
    alpha = 1.0 if terms.name == "sft" else terms.alpha
    kind = working_type(product)
    logits = head.finish(product.to(kind))
    capped = logits.clone() if need_gradient and head.soft_cap is not None else None  # the way back through the cap starts there
    if ids.masked is not None:
        logits = logits.masked_fill_(ids.masked, -math.inf)
    log_z = logits.logsumexp(-1)
    ce = (log_z - logits.gather(-1, labels[:, None])[:, 0]).sum()
    gradient = None
    if need_gradient and alpha:
        gradient = (logits - log_z[:, None]).exp_().mul_(alpha)
        gradient[torch.arange(len(labels), device=labels.device), labels] -= alpha
    kd = ce.new_zeros(())
    if teacher is not None:
        value, slope = _divergence(logits, teacher.to(kind), terms, options, ids, need_gradient and alpha < 1)
        square = terms.tau**2 if terms.tau_squared else 1.0
        kd = value * square
        if slope is not None:
            slope.mul_((1 - alpha) * square / terms.tau)
            gradient = slope if gradient is None else gradient.add_(slope)
    if gradient is not None:
        if head.scale != 1.0:
            gradient.mul_(head.scale)
        if capped is not None and head.soft_cap is not None:  # d(cap tanh(x / cap)) / dx = 1 - tanh(x / cap)^2
            gradient.mul_(capped.div_(head.soft_cap).square_().neg_().add_(1))
        gradient = gradient.to(product.dtype)
    return torch.stack([alpha * ce + (1 - alpha) * kd, kd, ce]), gradient


def _divergence(
    logits: Tensor, teacher: Tensor, terms: LossTerms, options: dict[str, Any], ids: Ids, need_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of the divergence at tau, and its gradient with respect to logits / tau; both inputs are overwritten."""
    sides = []
    for side in (teacher, logits):
        if terms.tau != 1.0:
            side.div_(terms.tau)
        side.sub_(side.logsumexp(-1, keepdim=True))
        sides.append(side if ids.masked is None else side.masked_fill_(ids.masked, MASKED))
    log_p, log_q = sides
    if terms.name in CLOSED:
        value = CLOSED[terms.name](log_p, log_q, **options).sum()
        return value, log_q if need_gradient else None
    if not need_gradient:
        return FUNCTIONS[terms.name](log_p, log_q, **options).sum(), None
    with torch.enable_grad():
        leaf = log_q.requires_grad_()
        value = FUNCTIONS[terms.name](log_p, leaf, **options).sum()
        slope = torch.autograd.grad(value, leaf)[0]
    return value.detach(), slope.sub_(leaf.detach().exp_().mul_(slope.sum(-1, keepdim=True)))


def _add_product(accumulated: Tensor, gradient: Tensor, part: Tensor, *, first: bool) -> None:
    """accumulated += gradient^T part, in the accumulator's type; the first one overwrites what is there."""
    if accumulated.dtype != gradient.dtype:
        product = torch.mm(gradient.T, part)
        _ = accumulated.copy_(product) if first else accumulated.add_(product)
    elif first:
        torch.mm(gradient.T, part, out=accumulated)
    else:
        accumulated.addmm_(gradient.T, part)
