"""The teacher's distribution as its k largest probabilities and the mass of all others, in a few
bytes per token (docs/method.md, eq. 19).

The mass of the other ids is stored for each temperature of the plan, since it does not follow
from the mass at temperature 1. Student and teacher are then compared over k + 1 outcomes: the k
ids and "any other". For most divergences that is a lower bound of the full value (data-processing
inequality). `TopKCodec.error_sums` measures what the records leave out.

Shapes: n tokens, v ids that take part, k stored ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.errors import RecipeError
from pocl_ds.losses.divergences import DIVERGENCES, MASKED, fkl
from pocl_ds.losses.record_codec import RecordCodec


@dataclass(frozen=True)
class TopKCodec(RecordCodec):
    """Stores the k most probable ids of a token, and the other ids' mass at each temperature."""

    mode: ClassVar[str] = "cached_topk"
    error_names: ClassVar[tuple[str, str]] = ("mass", "kl")

    k: int
    size: int
    temperatures: tuple[float, ...]

    @property
    def label(self) -> str:
        """See `RecordCodec`."""
        return f"top-{self.k} lists"

    @property
    def slots(self) -> int:
        """See `RecordCodec`."""
        return self.k

    @property
    def header_size(self) -> int:
        """See `RecordCodec`: the other ids' mass at each temperature."""
        return len(self.temperatures)

    def validate(self, allowed: int) -> None:
        """See `RecordCodec`; raises RecipeError also if k exceeds `allowed`."""
        if self.k > allowed:
            raise RecipeError(
                f"teacher_cache.top_k={self.k} is more than the {allowed} ids that teacher and "
                f"student share: lower it"
            )
        super().validate(allowed)

    def encode(self, logits: Tensor, keys: NDArray[np.uint64] | None = None) -> Tensor:
        """See `RecordCodec`. There is no random choice: keys have no effect."""
        # The k largest logits as distances from the largest one.
        top, ids = logits.float().topk(self.k, dim=-1)
        # The mass of all other ids at each temperature, relative to the largest logit.
        other_logits = (logits.float() - top[:, :1]).scatter_(-1, ids, -math.inf)
        masses = torch.stack(
            [torch.logsumexp(other_logits / temperature, -1) for temperature in self.temperatures],
            -1,
        )
        return self.pack(masses, ids, top[:, :1] - top)

    def decode(self, records: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Ids [n, k] and log-probabilities [n, k + 1] at a temperature; the last one is that of all
        other ids, MASKED if there is none.

        Raises RecipeError for a temperature that the records do not hold.
        """
        index = self.temperature_index(temperature)
        masses, ids, distances = self.unpack(records)
        assert distances is not None
        # Normalize the k logits and the other ids' mass to log-probabilities.
        logits = torch.cat([-distances / temperature, masses[:, index, None]], -1)
        return ids, torch.log_softmax(logits, -1).clamp(min=MASKED)

    def divergence(
        self,
        records: Tensor,
        log_q: Tensor,
        name: str,
        options: dict[str, Any],
        temperature: float,
        buffer: Callable[[], Tensor],
        need_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """See `RecordCodec`; any divergence, over k ids and "any other" (eq. 19)."""
        ids, log_p = self.decode(records, temperature)
        # The student's probability of any other id.
        log_others = buffer().copy_(log_q).scatter_(-1, ids, MASKED)
        log_q_other = torch.logsumexp(log_others, -1, keepdim=True)
        outcomes = torch.cat([log_q.gather(-1, ids), log_q_other], -1)
        log_p = log_p.to(log_q.dtype)
        if not need_gradient:
            return DIVERGENCES[name](log_p, outcomes, **options), None
        with torch.enable_grad():
            leaf = outcomes.requires_grad_()
            value = DIVERGENCES[name](log_p, leaf, **options)
            slope = torch.autograd.grad(value.sum(), leaf)[0]
        # From outcomes to logits: d log q_i is 1 at i, d log_q_other is q_j / q_other at each other
        # j, and both are less q everywhere.
        gradient = log_q.exp_().mul_(-slope.sum(-1, keepdim=True))
        gradient.addcmul_(log_others.sub_(log_q_other.detach()).exp_(), slope[:, -1:])
        return value.detach(), gradient.scatter_add_(-1, ids, slope[:, :-1])

    def error_sums(self, logits: Tensor, records: Tensor) -> Tensor:
        """See `RecordCodec`. The columns are the mass of the ids that are not stored, and the KL
        divergence in nats from the full distribution to the stored one with that mass spread
        evenly over its ids.
        """
        allowed = (logits > -math.inf).sum(-1, keepdim=True)
        rows = []
        for temperature in self.temperatures:
            ids, stored = self.decode(records, temperature)
            log_p = torch.log_softmax(logits.float() / temperature, -1).clamp(min=MASKED)
            even = stored[:, -1:] - (allowed - self.k).clamp(min=1).log()
            spread = even.expand_as(log_p).scatter(-1, ids, stored[:, :-1])
            rows.append(torch.stack([stored[:, -1].exp().sum(), fkl(log_p, spread).sum()]))
        return torch.stack(rows).double()

    def describe_error(self, means: Sequence[float]) -> tuple[dict[str, float], str]:
        """See `RecordCodec`."""
        mass, kl = means
        return dict(zip(self.error_names, means, strict=True)), (
            f"the top {self.k} leave out a probability of {mass:.4f} and {kl:.4f} nats per token "
            "(KL to the records, with the rest spread evenly)"
        )
