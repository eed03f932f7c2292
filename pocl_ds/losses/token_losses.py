"""From logits to loss sums and their gradient, in place: what the fused head does with a block of
tokens between its matrix products.

A chunk of logits is processed one block of rows at a time, in buffers that all blocks share. A
block is small enough to stay in a CPU's cache, where a pass over it costs a fraction of one over
memory, and memory that is allocated once is faulted in once.

Shapes: n tokens of a block, v ids that take part. Letters: see `divergences`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from pocl_ds.losses.closed_forms import CLOSED_FORMS
from pocl_ds.losses.cross_tokenizer import CrossTokenizerTeacher, uld_with_gradient
from pocl_ds.losses.divergences import DIVERGENCES, MASKED
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.losses.token_inputs import TokenInputs
from pocl_ds.losses.token_rules import TokenRule
from pocl_ds.losses.token_scale import TokenScale
from pocl_ds.losses.token_signals import LogProbSignals
from pocl_ds.models.heads import HeadMixture, OutputHead
from pocl_ds.models.vocab import VocabMap

# Vectors of v numbers that one row of a block holds at once, in the dtype of the computation;
# autograd stores its graph as well.
LIVE_ROWS, LIVE_ROWS_AUTOGRAD = 7, 20
# Bytes of one buffer of a block: a few of them fit a CPU's cache; a GPU needs few and large
# kernels.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}

# What turns the teacher's hidden states (or cached records) into distributions: one head, the
# heads of an ensemble, the codec of cached records, or a teacher with another tokenizer.
TeacherHead: TypeAlias = OutputHead | HeadMixture | RecordCodec | CrossTokenizerTeacher


@dataclass(frozen=True)
class LossTerms:
    """The loss of one optimizer step: sft_ratio CE + (1 - sft_ratio) temperature^2 D
    (docs/method.md, eq. 9).

    options: of the divergence. token_rule: temperature and weight of each token; None: all tokens
    are alike.
    """

    name: str
    temperature: float = 1.0
    sft_ratio: float = 0.0
    scale_by_temperature_squared: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    token_rule: TokenRule | None = None

    @property
    def ce_weight(self) -> float:
        """Weight of the cross-entropy: sft_ratio, or 1 for plain SFT."""
        return 1.0 if self.name == "sft" else self.sft_ratio

    @property
    def kd_factor(self) -> float:
        """Factor of the divergence: temperature^2 unless the recipe turns it off."""
        return self.temperature**2 if self.scale_by_temperature_squared else 1.0

    def num_sums(self, tokens: TokenInputs) -> int:
        """The number of sums that a `LogitLoss` returns for these tokens."""
        if self.token_rule is not None:
            return 6 if self.token_rule.is_checked else 4
        return 2 if tokens.weights is None else 4


def row_bytes(name: str, size: int, dtype: torch.dtype) -> int:
    """Bytes of buffers that one row of a block needs. dtype: of the computation."""
    closed = name in CLOSED_FORMS or name == "sft"
    return size * dtype.itemsize * (LIVE_ROWS if closed else LIVE_ROWS_AUTOGRAD)


def block_rows(size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a block. On a CPU every thread gets the same number of them."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    rows = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"]) // (size * dtype.itemsize)
    return threads * max(1, rows // threads)


def in_place_divergence(name: str, *, need_gradient: bool) -> Callable[..., Tensor]:
    """A divergence as a function (log_p, log_q, buffer, **options) that follows the contract of
    `closed_forms`: its closed form if there is one, else autograd through its formula.
    """
    if name in CLOSED_FORMS:
        return CLOSED_FORMS[name]
    if need_gradient:
        return partial(_differentiate, DIVERGENCES[name])
    formula = DIVERGENCES[name]
    return lambda log_p, log_q, buffer, **options: formula(log_p, log_q, **options)


def _differentiate(
    formula: Callable[..., Tensor],
    log_p: Tensor,
    log_q: Tensor,
    buffer: Callable[[int], Tensor],
    **options: Any,
) -> Tensor:
    with torch.enable_grad():
        leaf = log_q.detach().requires_grad_()
        value = formula(log_p, leaf, **options)
        slope = torch.autograd.grad(value.sum(), leaf)[0]
    log_q.exp_().mul_(slope.sum(-1, keepdim=True))
    torch.sub(slope, log_q, out=log_q)
    return value.detach()


class Buffers:
    """Numbered buffers [rows, v], allocated at their first use."""

    def __init__(self, rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.dtype = rows, dtype
        self._allocate = lambda: torch.empty(rows, size, dtype=dtype, device=device)
        self._buffers: dict[int, Tensor] = {}

    def __call__(self, number: int, rows: int) -> Tensor:
        """The first rows of a buffer; their contents are undefined."""
        if number not in self._buffers:
            self._buffers[number] = self._allocate()
        return self._buffers[number][:rows]

    def cast(self, values: Tensor, number: int) -> Tensor:
        """The values in the type of the computation: the same tensor, or a copy in this buffer."""
        if values.dtype == self.dtype:
            return values
        return self(number, len(values)).copy_(values)


class LogitLoss(Protocol):
    """The loss of n tokens from the products of hidden states and heads.

    `EagerLoss` computes every loss, block by block, and is the reference. `TritonLoss` computes
    a complete chunk on a GPU.
    """

    def __call__(self, student: Tensor, teacher: Tensor | None, tokens: TokenInputs) -> Tensor:
        """Sums over n tokens [`num_sums`]: of the divergence (times temperature^2, see
        `kd_factor`) and of the cross-entropy. If tokens have weights or a rule, the same two sums
        with weights follow; if the rule is a plugin's, then the numbers of `count_invalid`.

        student: [n, v] products of hidden states and the head's weight. They are overwritten:
        with need_gradient by the gradient of the total loss in the products, in their own type.
        teacher: [n, v] products; [n, teachers, v] for a `HeadMixture`; [n, bytes] records for a
        `RecordCodec`; [n] token indices for a `CrossTokenizerTeacher`.
        """
        ...


@dataclass(frozen=True)
class EagerLoss:
    """The loss of a block of tokens in PyTorch operations, as `LogitLoss`.

    head, teacher_head: bias, scale and soft cap of the products; teacher_head is None if
    the loss has no divergence. options: of the divergence, with its defaults.
    """

    terms: LossTerms
    options: dict[str, Any]
    vocab: VocabMap
    head: OutputHead
    teacher_head: TeacherHead | None
    buffers: Buffers
    need_gradient: bool

    def __call__(self, student: Tensor, teacher: Tensor | None, tokens: TokenInputs) -> Tensor:
        """See `LogitLoss`."""
        terms, buffers, rows = self.terms, self.buffers, len(student)

        # Logits, and log q at temperature 1 for the cross-entropy.
        logits = self.head.scale_and_cap_(buffers.cast(student, 0))
        capped = None
        if self.need_gradient and self.head.soft_cap is not None:
            capped = buffers(1, rows).copy_(logits)
        self._mask(logits, -math.inf)
        log_q = torch.log_softmax(logits, -1, out=buffers(2, rows))
        ce = log_q.gather(-1, tokens.labels[:, None])[:, 0].neg_()

        # The divergence at its temperature; its gradient takes the place of log q.
        kd, gradient, signals = ce.new_zeros(rows), None, None
        if teacher is not None and terms.token_rule is not None:
            signals = self._signals(teacher, log_q, tokens)
        scale = TokenScale.of(terms, tokens, signals, ce)
        if teacher is not None:
            temperature = _by_row(scale.temperature)
            scaled_log_q = self._at_temperature(logits, log_q, temperature)
            if isinstance(self.teacher_head, RecordCodec):
                kd, gradient = self.teacher_head.divergence(
                    teacher,
                    scaled_log_q,
                    terms.name,
                    self.options,
                    terms.temperature,
                    lambda: buffers(6, rows),
                    self._need_kd_gradient,
                )
            elif isinstance(self.teacher_head, CrossTokenizerTeacher):
                kd, gradient = self._uld(scaled_log_q, teacher, self.teacher_head)
            else:
                log_p, free = self._teacher_log_probs(teacher, temperature)
                buffer = lambda i: buffers(6, rows) if i == 2 else (logits, free)[i]  # noqa: E731
                kd = self._divergence(log_p, scaled_log_q, buffer, **self.options)
                gradient = scaled_log_q if self._need_kd_gradient else None
            if gradient is not None:
                gradient.mul_(_by_row(scale.gradient_factor(terms)))

        # The gradient in the products replaces the student's products.
        if self.need_gradient:
            gradient = self._add_ce_gradient(gradient, log_q, tokens)
            self._backward_through_head(gradient, capped)
            student.copy_(gradient)
        return scale.sums(torch.stack([kd, ce]), tokens, terms.num_sums(tokens))

    def _signals(self, teacher: Tensor, log_q: Tensor, tokens: TokenInputs) -> LogProbSignals:
        """What a token rule reads. Masked ids of log_q become MASKED."""
        log_p = lambda: self._teacher_log_probs(teacher, 1.0, keep_products=True)[0]  # noqa: E731
        buffer = lambda i: self.buffers(5 + i, len(log_q))  # noqa: E731
        assert tokens.position is not None
        return LogProbSignals(
            log_p, self._mask(log_q, MASKED), tokens.labels, tokens.position, buffer
        )

    @cached_property
    def _divergence(self) -> Callable[..., Tensor]:
        return in_place_divergence(self.terms.name, need_gradient=self._need_kd_gradient)

    @property
    def _need_kd_gradient(self) -> bool:
        return self.need_gradient and self.terms.ce_weight < 1

    def _mask(self, values: Tensor, value: float) -> Tensor:
        """Fill the ids that take no part, in place."""
        masked = self.vocab.masked
        return values if masked is None else values.masked_fill_(masked, value)

    def _at_temperature(self, logits: Tensor, log_q: Tensor, temperature: float | Tensor) -> Tensor:
        """log q at a temperature, masked ids at MASKED; logits and possibly log_q are
        overwritten.
        """
        rows = len(logits)
        if isinstance(temperature, Tensor) or temperature != 1.0:
            logits.div_(temperature)
            return self._mask(torch.log_softmax(logits, -1, out=self.buffers(5, rows)), MASKED)
        # log_q itself serves, unless the gradient of the cross-entropy still needs it.
        ce_needs_log_q = self.need_gradient and self.terms.ce_weight > 0
        return self._mask(self.buffers(5, rows).copy_(log_q) if ce_needs_log_q else log_q, MASKED)

    def _teacher_log_probs(
        self, teacher: Tensor, temperature: float | Tensor, *, keep_products: bool = False
    ) -> tuple[Tensor, Tensor]:
        """log p at a temperature from products, mixed over an ensemble, masked ids at MASKED; and a
        tensor of its shape that is free to use. keep_products: do not overwrite them.
        """
        head = self.teacher_head
        if not isinstance(head, HeadMixture):
            assert isinstance(head, OutputHead)
            log_p, free = self._head_log_probs(head, teacher, 4, temperature, keep_products)
            return self._mask(log_p, MASKED), free
        log_p, free = self._head_log_probs(
            head.heads[0], teacher[:, 0], 4, temperature, keep_products
        )
        log_p.add_(math.log(head.weights[0]))
        members = zip(teacher.unbind(1)[1:], head.heads[1:], head.weights[1:], strict=True)
        for products, member, weight in members:
            member_log_p, free = self._head_log_probs(
                member, products, 6, temperature, keep_products
            )
            torch.logaddexp(log_p, member_log_p.add_(math.log(weight)), out=log_p)
        return self._mask(log_p, MASKED), free

    def _head_log_probs(
        self,
        head: OutputHead,
        products: Tensor,
        number: int,
        temperature: float | Tensor,
        keep_products: bool,
    ) -> tuple[Tensor, Tensor]:
        """log p of one teacher in this buffer, and a tensor of its shape that is free to use."""
        rows = len(products)
        logits = self.buffers.cast(products, 3)
        if keep_products and logits is products:
            logits = self.buffers(3, rows).copy_(products)
        logits = self._mask(head.scale_and_cap_(logits), -math.inf)
        if isinstance(temperature, Tensor) or temperature != 1.0:
            logits.div_(temperature)
        return torch.log_softmax(logits, -1, out=self.buffers(number, rows)), logits

    def _uld(
        self, log_q: Tensor, tokens: Tensor, teacher: CrossTokenizerTeacher
    ) -> tuple[Tensor, Tensor | None]:
        """The ULD loss of each token; 0 without a teacher token (index -1)."""
        paired = tokens >= 0
        log_p = teacher.log_probs(tokens[paired], self.terms.temperature, log_q.dtype)
        paired_value, slope = uld_with_gradient(log_p, log_q[paired])
        value = log_q.new_zeros(len(tokens)).masked_scatter_(paired, paired_value)
        if not self._need_kd_gradient:
            return value, None
        return value, log_q.zero_().masked_scatter_(paired[:, None], slope)

    def _add_ce_gradient(
        self, gradient: Tensor | None, log_q: Tensor, tokens: TokenInputs
    ) -> Tensor:
        """Add the gradient of the cross-entropy (q, minus 1 at the label) times its weight."""
        weight, token = (
            tokens.ce_weight(self.terms.ce_weight),
            torch.arange(len(log_q), device=log_q.device),
        )
        if isinstance(weight, Tensor):
            q = log_q.exp_()
            scaled = weight[:, None]
            gradient = q.mul_(scaled) if gradient is None else gradient.addcmul_(q, scaled)
            gradient[token, tokens.labels] -= weight
        elif weight > 0:
            q = log_q.exp_()
            gradient = q.mul_(weight) if gradient is None else gradient.add_(q, alpha=weight)
            gradient[token, tokens.labels] -= weight
        assert gradient is not None, "a loss with ce_weight 0 has a divergence"
        return gradient

    def _backward_through_head(self, gradient: Tensor, capped: Tensor | None) -> None:
        """From the gradient in the logits to that in the products, in place; see
        `scale_and_cap_`.
        """
        if self.head.scale != 1.0:
            gradient.mul_(self.head.scale)
        if capped is not None and self.head.soft_cap is not None:
            # d(cap tanh(x / cap)) / dx = 1 - tanh(x / cap)^2
            gradient.mul_(capped.div_(self.head.soft_cap).square_().neg_().add_(1))


def _by_row(value: float | Tensor) -> float | Tensor:
    """A value for each token [n] as a factor of rows [n, 1]; one number as it is."""
    return value[:, None] if isinstance(value, Tensor) else value
