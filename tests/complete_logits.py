"""A small case with complete logits in float64, the reference of the fused loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pocl_ds.losses import divergence
from pocl_ds.losses.fused_head import loss_sums
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap

TOKENS, SAMPLES, IDS = 11, 4, 38
SAMPLE_OF_TOKEN = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3])


class Case:
    """Float64 heads with bias, scale, soft cap, a masked id and other ids of the teacher."""

    def __init__(self, seed: int = 3, *, tied: bool = False) -> None:
        source = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
        self.student = OutputHead(nn.Parameter(draw(40, 8)), nn.Parameter(draw(40)), 0.5, 7.0)
        self.teacher = OutputHead(nn.Parameter(draw(44, 12)), None, 1.0, None)
        # The hidden states of a tied head depend on its weight.
        inputs = draw(TOKENS, 40) / 4
        self.hidden = inputs @ self.student.weight if tied else draw(TOKENS, 8).requires_grad_()
        self.teacher_hidden = draw(TOKENS, 12)
        self.labels = torch.randint(0, 37, (TOKENS,), generator=source)
        mapped = torch.randperm(44, generator=source)[:IDS]
        self.vocab = VocabMap(IDS, torch.arange(IDS) == 37, mapped)
        leaves = [self.student.weight, self.student.bias]
        self.leaves = leaves if tied else [self.hidden, *leaves]

    def logits(self) -> tuple[Tensor, Tensor]:
        """Complete logits of student and teacher."""
        assert self.vocab.masked is not None and self.vocab.teacher_ids is not None
        z_q = nn.functional.linear(self.hidden, self.student.weight, self.student.bias)
        z_q = 7.0 * (z_q[:, :IDS] * 0.5 / 7.0).tanh()
        z_p = (self.teacher_hidden @ self.teacher.weight.T)[:, self.vocab.teacher_ids]
        masked = self.vocab.masked
        return z_q.masked_fill(masked, -torch.inf), z_p.masked_fill(masked, -torch.inf)

    def sums(self, terms: LossTerms, weights: Tensor | None, **changes: Any) -> Any:
        arguments: dict[str, Any] = {
            "vocab": self.vocab,
            "teacher_hidden": self.teacher_hidden,
            "teacher_head": self.teacher,
            "sample_of_token": SAMPLE_OF_TOKEN,
            "sample_weights": weights,
        }
        return loss_sums(self.hidden, self.student, self.labels, terms, **arguments | changes)

    def by_token(self, terms: LossTerms) -> tuple[Tensor, Tensor]:
        """Divergence and cross-entropy of each token, by autograd over the complete logits."""
        z_q, z_p = self.logits()
        ce = nn.functional.cross_entropy(z_q, self.labels, reduction="none")
        temperature = terms.temperature
        return divergence(terms.name, z_q, z_p, temperature=temperature, reduction="none"), ce

    def gradients(self, total: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total, self.leaves, retain_graph=True)


def assert_close(actual: Any, expected: Any) -> None:
    for value, reference in zip(actual, expected, strict=True):
        assert torch.allclose(value, reference.detach(), rtol=1e-9, atol=1e-10)
