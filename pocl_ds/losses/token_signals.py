"""The signals that token rules read (see `token_rules.TokenSignals`): as values, or computed from
log-probabilities when they are read.

Shapes: n tokens, v ids that take part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SignalValues:
    """Signals that are computed already, each [n]."""

    position: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    hellinger: Tensor
    teacher_label_prob: Tensor
    student_label_prob: Tensor
    agreement: Tensor


class LogProbSignals:
    """Signals from log-probabilities of both sides at temperature 1; one that is never read costs
    nothing.

    log_p, log_q: [n, v], masked ids at `divergences.MASKED`; log_p as a function, since not every
    rule reads the teacher. labels, position: [n]. buffer: `buffer(0)` and `buffer(1)` are memory
    [n, v] for intermediate results.
    """

    def __init__(
        self,
        log_p: Callable[[], Tensor],
        log_q: Tensor,
        labels: Tensor,
        position: Tensor,
        buffer: Callable[[int], Tensor],
    ) -> None:
        self._compute_log_p, self._log_q, self._labels = log_p, log_q, labels
        self._buffer, self.position = buffer, position

    @cached_property
    def _log_p(self) -> Tensor:
        return self._compute_log_p()

    @cached_property
    def teacher_entropy(self) -> Tensor:
        return self._entropy(self._log_p)

    @cached_property
    def student_entropy(self) -> Tensor:
        return self._entropy(self._log_q)

    @cached_property
    def hellinger(self) -> Tensor:
        # As a sum of squares: 1 - sum(sqrt(p q)) would cancel where p and q are alike.
        root_p, root_q = (
            torch.mul(side, 0.5, out=self._buffer(number)).exp_()
            for number, side in enumerate((self._log_p, self._log_q))
        )
        return root_p.sub_(root_q).square_().sum(-1).mul_(0.5).clamp_(max=1).sqrt_()

    @cached_property
    def teacher_label_prob(self) -> Tensor:
        return self._label_prob(self._log_p)

    @cached_property
    def student_label_prob(self) -> Tensor:
        return self._label_prob(self._log_q)

    @cached_property
    def agreement(self) -> Tensor:
        same = self._log_p.argmax(-1) == self._log_q.argmax(-1)
        return same.to(self._log_p.dtype)

    def _entropy(self, log_probs: Tensor) -> Tensor:
        terms = torch.exp(log_probs, out=self._buffer(0)).mul_(log_probs)
        return terms.sum(-1).neg_().clamp_(min=0)

    def _label_prob(self, log_probs: Tensor) -> Tensor:
        return log_probs.gather(-1, self._labels[:, None])[:, 0].exp_()
