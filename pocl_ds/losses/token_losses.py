"""From logits to loss sums and their gradient, in place: what a chunk of the fused head does
between its matrix products.

The logits of a chunk are worked on a block of rows at a time, in buffers that all blocks share. A
block is small enough to stay in a CPU's cache, where a pass over it costs a fraction of one over
memory, and what is allocated once is faulted in once.

Shapes: n tokens of a chunk, v ids that take part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pocl_ds.losses.closed_forms import CLOSED
from pocl_ds.losses.cross_tokenizer import OtherTokens, uld
from pocl_ds.losses.divergences import FUNCTIONS, MASKED, working_type
from pocl_ds.losses.top_k import TopK, truncated_divergence
from pocl_ds.models.heads import Head, Mixture
from pocl_ds.models.vocab import Ids

# Numbers of v alive for one row of a block, in the working type; through autograd its graph too.
ALIVE, ALIVE_AUTOGRAD = 7, 20
# Bytes of one buffer of a block: a few of them fit a CPU's cache; a GPU wants few and large
# kernels.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


# Who answers for the teacher: its head, those of several, records, or a teacher that reads its own
# tokens.
TeacherHead: TypeAlias = Head | Mixture | TopK | OtherTokens


@dataclass(frozen=True)
class LossTerms:
    """What the loss of one step is made of: sft_ratio * CE + (1 - sft_ratio) * KD at temperature temperature
    (METHOD 3).
    """

    name: str
    temperature: float = 1.0
    sft_ratio: float = 0.0
    scale_by_temperature_squared: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def share_of_ce(self) -> float:
        """sft_ratio, which is 1 for plain SFT."""
        return 1.0 if self.name == "sft" else self.sft_ratio

    @property
    def kd_factor(self) -> float:
        """What multiplies the divergence: temperature squared, so that its gradient keeps its size (METHOD
        3).
        """
        return self.temperature**2 if self.scale_by_temperature_squared else 1.0


def row_bytes(name: str, size: int, kind: torch.dtype) -> int:
    """Bytes of buffers that one row of a block needs. kind: the working type."""
    return size * kind.itemsize * (ALIVE if name in CLOSED or name == "sft" else ALIVE_AUTOGRAD)


def block_rows(size: int, kind: torch.dtype, device: torch.device) -> int:
    """Rows of a block: on a CPU as many for each thread, which share rows out among themselves."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    fitting = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"]) // (size * kind.itemsize)
    return threads * max(1, fitting // threads)


class Buffers:
    """Numbered buffers [rows, v], allocated when first used."""

    def __init__(self, rows: int, size: int, kind: torch.dtype, device: torch.device) -> None:
        self.rows, self.kind = rows, kind
        self._make = lambda: torch.empty(rows, size, dtype=kind, device=device)
        self._kept: dict[int, Tensor] = {}

    def __call__(self, number: int, rows: int) -> Tensor:
        """The first rows of a buffer, with whatever was left in it."""
        if number not in self._kept:
            self._kept[number] = self._make()
        return self._kept[number][:rows]


@dataclass(frozen=True)
class BlockLoss:
    """The loss on logits, a block of rows at a time. heads: the student's and the teacher's, for
    what follows on the products; the teacher's is a `TopK` where its largest probabilities were
    recorded, and None where nobody asks it.
    """

    terms: LossTerms
    options: dict[str, Any]  # of the divergence, with defaults
    ids: Ids
    heads: tuple[Head, TeacherHead | None]
    buffers: Buffers
    need_gradient: bool

    def __call__(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Sums over n tokens of (total, KD, CE), in the working type.

        student, teacher: [n, v] products of hidden states and heads, which are overwritten: with
        need_gradient `student` ends as the gradient of total with respect to itself, in its own
        type. For a `Mixture` of k teachers: products [n, k, v]; for a `TopK`: its records [n,
        bytes]; for `OtherTokens` numbers [n]. weights [n], in the working type: total is the CE
        with a weight for each token.
        """
        sums = student.new_zeros(3, dtype=working_type(student.dtype))
        for rows in (
            slice(i, i + self.buffers.rows) for i in range(0, len(student), self.buffers.rows)
        ):
            parts = (None if part is None else part[rows] for part in (teacher, weights))
            sums += self._block(student[rows], labels[rows], *parts)
        return sums

    def _block(
        self, student: Tensor, labels: Tensor, teacher: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        terms, ids, buffers, need_gradient = self.terms, self.ids, self.buffers, self.need_gradient
        rows, sft_ratio, (head, teacher_head) = len(student), terms.share_of_ce, self.heads
        logits = head.finish_(_working(student, buffers, 0))
        capped = (
            buffers(1, rows).copy_(logits) if need_gradient and head.soft_cap is not None else None
        )
        _fill(logits, ids, -math.inf)
        log_q = torch.log_softmax(logits, -1, out=buffers(2, rows))  # at temperature = 1
        surprise = -log_q.gather(-1, labels[:, None])[:, 0]
        ce = surprise.sum()
        kd, gradient = ce.new_zeros(()), None
        if teacher is not None and teacher_head is not None:
            if terms.temperature != 1.0:
                cooled = torch.log_softmax(logits.div_(terms.temperature), -1, out=buffers(5, rows))
            else:
                with_ce = need_gradient and sft_ratio > 0  # then log_q is wanted again below
                cooled = buffers(5, rows).copy_(log_q) if with_ce else log_q
            value, gradient = self._divergence(
                logits, _fill(cooled, ids, MASKED), teacher, teacher_head
            )
            kd = value * terms.kd_factor
            if gradient is not None:
                gradient.mul_((1 - sft_ratio) * terms.kd_factor / terms.temperature)
        if need_gradient and weights is not None:
            gradient = log_q.exp_().mul_(weights[:, None])
            gradient[torch.arange(rows, device=labels.device), labels] -= weights
        elif need_gradient and sft_ratio > 0:
            q = log_q.exp_()
            gradient = q.mul_(sft_ratio) if gradient is None else gradient.add_(q, alpha=sft_ratio)
            gradient[torch.arange(rows, device=labels.device), labels] -= sft_ratio
        if gradient is not None:
            if head.scale != 1.0:
                gradient.mul_(head.scale)
            if (
                capped is not None and head.soft_cap is not None
            ):  # d(cap tanh(x / cap)) / dx = 1 - tanh(x / cap)^2
                gradient.mul_(capped.div_(head.soft_cap).square_().neg_().add_(1))
            student.copy_(gradient)
        total = (
            sft_ratio * ce + (1 - sft_ratio) * kd if weights is None else (weights * surprise).sum()
        )
        return torch.stack([total, kd, ce])

    def _divergence(
        self, spent: Tensor, log_q: Tensor, teacher: Tensor, head: TeacherHead
    ) -> tuple[Tensor, Tensor | None]:
        """Sum of the divergence at temperature, and its gradient with respect to the logits of log_q, which
        is overwritten.

        spent: a buffer that may be written over; teacher: products of a head, records, or numbers
        of tokens.
        """
        terms, buffers, rows = self.terms, self.buffers, len(log_q)
        need_gradient = self.need_gradient and terms.share_of_ce < 1
        if isinstance(head, TopK):
            top = head.decode(teacher, terms.temperature)
            return truncated_divergence(
                *top, log_q, terms.name, self.options, lambda: buffers(6, rows), need_gradient
            )
        if isinstance(head, OtherTokens):
            asked = teacher >= 0
            found, slope = uld(
                head.log_p(teacher[asked], terms.temperature, log_q.dtype), log_q[asked]
            )
            return found.sum(), log_q.zero_().masked_scatter_(
                asked[:, None], slope
            ) if need_gradient else None
        if isinstance(head, Mixture):
            log_p, used = self._log_p(head.heads[0], teacher[:, 0], 4)
            log_p.add_(math.log(head.weights[0]))
            for part, one, weight in zip(
                teacher.unbind(1)[1:], head.heads[1:], head.weights[1:], strict=True
            ):
                other, used = self._log_p(one, part, 6)
                torch.logaddexp(log_p, other.add_(math.log(weight)), out=log_p)
        else:
            log_p, used = self._log_p(head, teacher, 4)
        spare = lambda number: (spent, used, buffers(6, rows))[number]  # noqa: E731
        return _divergence(
            _fill(log_p, self.ids, MASKED), log_q, terms.name, self.options, spare, need_gradient
        )

    def _log_p(self, head: Head, product: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities of one teacher at temperature in a buffer of this number, from a product; and a
        tensor that is free now.
        """
        targets = _fill(head.finish_(_working(product, self.buffers, 3)), self.ids, -math.inf)
        if self.terms.temperature != 1.0:
            targets.div_(self.terms.temperature)
        return torch.log_softmax(targets, -1, out=self.buffers(number, len(product))), targets


def _divergence(
    log_p: Tensor,
    log_q: Tensor,
    name: str,
    options: dict[str, Any],
    spare: Callable[[int], Tensor],
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the divergence, and its gradient with respect to the logits of log_q; both inputs are
    overwritten.
    """
    if name in CLOSED:
        value = CLOSED[name](log_p, log_q, spare, **options).sum()
        return value, log_q if need_gradient else None
    if not need_gradient:
        return FUNCTIONS[name](log_p, log_q, **options).sum(), None
    with torch.enable_grad():
        leaf = log_q.detach().requires_grad_()
        value = FUNCTIONS[name](log_p, leaf, **options).sum()
        slope = torch.autograd.grad(value, leaf)[0]
    return value.detach(), slope.sub_(leaf.detach().exp_().mul_(slope.sum(-1, keepdim=True)))


def _working(part: Tensor, buffers: Buffers, number: int) -> Tensor:
    """The block in the working type: itself, or a copy in a buffer."""
    return part if part.dtype == buffers.kind else buffers(number, len(part)).copy_(part)


def _fill(values: Tensor, ids: Ids, value: float) -> Tensor:
    return values if ids.masked is None else values.masked_fill_(ids.masked, value)
