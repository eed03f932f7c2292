"""The teacher's distribution as its k largest probabilities and the mass of all others, in a few
bytes per token (docs/method.md, eq. 19).

The mass of the other ids is stored for each temperature of the plan, since it does not follow
from the mass at temperature 1. Student and teacher are then compared over k + 1 outcomes: the k
ids and "any other". For most divergences that is a lower bound of the full value (data-processing
inequality). `TopKCodec.truncation_error` measures what the records leave out.

Shapes: n tokens, v ids that take part, k stored ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocl_ds.errors import RecipeError
from pocl_ds.losses.divergences import DIVERGENCES, MASKED, fkl

# A logit's distance below the largest one is stored as a fraction of the k-th distance, in 16 bits.
DISTANCE_STEPS = 65_535
# Ids have 18 bits: 16 in a uint16, the other two packed four to a byte.
MAX_IDS = 1 << 18


@dataclass(frozen=True)
class TopKCodec:
    """Encodes a distribution over `size` ids as a record of bytes and decodes it again.

    k: stored ids of a token. temperatures: those of the plan, and 1.
    """

    k: int
    size: int
    temperatures: tuple[float, ...]

    @property
    def bytes(self) -> int:
        """Bytes of one token's record: in float32 the k-th distance and the other ids' mass at each
        temperature, then k distances and k ids; rounded up to a multiple of 4.
        """
        high_bits = -(-self.k // 4) if self.size > 1 << 16 else 0
        return -(-(4 * (1 + len(self.temperatures)) + 4 * self.k + high_bits) // 4) * 4

    def validate(self, allowed: int) -> None:
        """Raise RecipeError if k exceeds the number of ids that have a probability (`allowed`),
        or if a record cannot name that many ids.
        """
        if self.k > allowed:
            raise RecipeError(
                f"teacher_cache.top_k={self.k} is more than the {allowed} ids that teacher and "
                f"student share: lower it"
            )
        if self.size > MAX_IDS:
            raise RecipeError(
                f"teacher.mode=cached_topk supports at most {MAX_IDS} ids, and this vocabulary has "
                f"{self.size}: use teacher.mode=cached_hidden_states"
            )

    def encode(self, logits: Tensor) -> Tensor:
        """Records [n, bytes] uint8 of logits [n, v], which are -inf where an id is masked."""
        # The k largest logits as distances from the largest one.
        top, ids = logits.float().topk(self.k, dim=-1)
        distances = top[:, :1] - top
        scale = distances[:, -1:]
        steps = (
            distances / scale.clamp(min=torch.finfo(scale.dtype).tiny) * DISTANCE_STEPS
        ).round()
        # The mass of all other ids at each temperature, relative to the largest logit.
        other_logits = (logits.float() - top[:, :1]).scatter_(-1, ids, -math.inf)
        masses = torch.stack(
            [torch.logsumexp(other_logits / temperature, -1) for temperature in self.temperatures],
            -1,
        )
        parts = [
            _as_bytes(torch.cat([scale, masses], -1)),
            _as_bytes(steps.int().to(torch.uint16)),
            _as_bytes((ids & 0xFFFF).to(torch.uint16)),
        ]
        # The two high bits of each id, four ids to a byte.
        if self.size > 1 << 16:
            high = torch.nn.functional.pad(ids >> 16, (0, -self.k % 4)).view(len(ids), -1, 4)
            shifts = torch.tensor([0, 2, 4, 6], device=ids.device)
            parts.append((high << shifts).sum(-1).to(torch.uint8))
        record = torch.cat(parts, -1)
        return torch.nn.functional.pad(record, (0, self.bytes - record.shape[-1]))

    def decode(self, records: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Ids [n, k] and log-probabilities [n, k + 1] at a temperature; the last one is that of all
        other ids, MASKED if there is none.

        Raises RecipeError for a temperature that the records do not hold.
        """
        if temperature not in self.temperatures:
            stored = ", ".join(f"{value:g}" for value in self.temperatures)
            raise RecipeError(
                f"the cached top-{self.k} records of the teacher hold temperature {stored}, not "
                f"{temperature:g}: run `pocl cache-teacher` again"
            )
        # Split the record into its parts.
        floats = 1 + len(self.temperatures)
        header = records[:, : 4 * floats].contiguous().view(torch.float32)
        body = records[:, 4 * floats :]
        steps, low_bits = (
            body[:, 2 * self.k * i : 2 * self.k * (i + 1)].contiguous().view(torch.uint16).int()
            for i in range(2)
        )
        ids = low_bits.long()
        if self.size > 1 << 16:
            high = body[:, 4 * self.k : 4 * self.k - (-self.k // 4)].long()
            shifts = torch.tensor([0, 2, 4, 6], device=records.device)
            ids = ids | (((high[..., None] >> shifts) & 3).flatten(1)[:, : self.k] << 16)
        # Normalize the k logits and the other ids' mass to log-probabilities.
        distances = steps * (header[:, :1] / DISTANCE_STEPS)
        mass = header[:, 1 + self.temperatures.index(temperature), None]
        logits = torch.cat([-distances / temperature, mass], -1)
        return ids, torch.log_softmax(logits, -1).clamp(min=MASKED)

    def truncation_error(self, logits: Tensor, records: Tensor) -> Tensor:
        """What records leave out, summed over n tokens: [temperatures, 2] float64. The columns
        are the mass of the ids that are not stored, and the KL divergence in nats from the full
        distribution to the stored one with that mass spread evenly over its ids.

        logits: [n, v], -inf where an id is masked.
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


def truncated_divergence(
    ids: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    name: str,
    options: dict[str, Any],
    buffer: Callable[[], Tensor],
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The divergence of each token [n] over k ids and "any other" (docs/method.md, eq. 19), and its
    gradient in the logits whose log-softmax is log_q.

    ids: [n, k]; log_p: [n, k + 1]; log_q: [n, v], which the gradient overwrites; buffer: gives
    memory [n, v].
    """
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
    # From outcomes to logits: d log q_i is 1 at i, d log_q_other is q_j / q_other at each other j,
    # and both are less q everywhere.
    gradient = log_q.exp_().mul_(-slope.sum(-1, keepdim=True))
    gradient.addcmul_(log_others.sub_(log_q_other.detach()).exp_(), slope[:, -1:])
    return value.detach(), gradient.scatter_add_(-1, ids, slope[:, :-1])


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
