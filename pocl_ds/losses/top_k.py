"""The teacher's distribution as its k largest probabilities and the mass of all others, in a few
bytes a token.

The mass of the rest is kept for each temperature of the plan: a list made at temperature = 1 would lose the
tail at temperature = 2. Student and teacher are then compared over k + 1 outcomes, the k ids and "any
other", which for most divergences is a lower bound of the whole one (data-processing inequality).
What that leaves out is measured when the list is written (`lost`).

Shapes: n tokens, v ids that take part, k kept ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocl_ds.errors import RecipeError
from pocl_ds.losses.divergences import FUNCTIONS, MASKED

STEPS = 65_535  # a distance below the largest logit is kept as so many parts of the k-th one's
LARGEST = 1 << 18  # ids fit 18 bits: 16 in a number of their own, the others four to a byte


@dataclass(frozen=True)
class TopK:
    """How a distribution over `size` ids becomes a record of bytes, and back. temperatures: of the plan,
    and 1.
    """

    k: int
    size: int
    temperatures: tuple[float, ...]

    @property
    def bytes(self) -> int:
        """Of one token's record: scale and the rest at each temperature in float32, k distances, k ids;
        rounded up to 4.
        """
        high = -(-self.k // 4) if self.size > 1 << 16 else 0
        return -(-(4 * (1 + len(self.temperatures)) + 4 * self.k + high) // 4) * 4

    def check(self, allowed: int) -> None:
        """Raise RecipeError where there are not so many ids, or more than a record can name.
        allowed: ids with a probability.
        """
        if self.k > allowed:
            raise RecipeError(
                f"teacher_cache.top_k={self.k} is more than the {allowed} ids that teacher and student share: "
                f"take fewer"
            )
        if self.size > LARGEST:
            raise RecipeError(
                f"teacher.mode=cached_topk names at most {LARGEST} ids, this vocabulary has {self.size}: "
                f"use mode=hidden"
            )

    def encode(self, logits: Tensor) -> Tensor:
        """Records [n, bytes] of logits [n, v], -inf where an id is masked."""
        top, ids = logits.float().topk(self.k, dim=-1)
        below = top[:, :1] - top
        scale = below[:, -1:]
        steps = (below / scale.clamp(min=torch.finfo(scale.dtype).tiny) * STEPS).round().int()
        rest = (logits.float() - top[:, :1]).scatter_(-1, ids, -math.inf)
        masses = torch.stack(
            [torch.logsumexp(rest / temperature, -1) for temperature in self.temperatures], -1
        )
        parts = [
            _bytes(torch.cat([scale, masses], -1)),
            _bytes(steps.to(torch.uint16)),
            _bytes((ids & 0xFFFF).to(torch.uint16)),
        ]
        if self.size > 1 << 16:
            high = torch.nn.functional.pad(ids >> 16, (0, -self.k % 4)).view(len(ids), -1, 4)
            parts.append(
                (high << torch.tensor([0, 2, 4, 6], device=ids.device)).sum(-1).to(torch.uint8)
            )
        found = torch.cat(parts, -1)
        return torch.nn.functional.pad(found, (0, self.bytes - found.shape[-1]))

    def decode(self, records: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Ids [n, k] and log-probabilities [n, k + 1] at temperature, the rest's last, MASKED where there
        is none.

        Raises RecipeError for a temperature that the records were not made for.
        """
        if temperature not in self.temperatures:
            made = ", ".join(f"{one:g}" for one in self.temperatures)
            raise RecipeError(
                f"the teacher's top-{self.k} lists were made for temperature {made}, not {temperature:g}: run "
                f"`pocl cache-teacher` again"
            )
        numbers = 1 + len(self.temperatures)
        head = records[:, : 4 * numbers].contiguous().view(torch.float32)
        rest = records[:, 4 * numbers :]
        steps, low = (
            rest[:, 2 * self.k * i : 2 * self.k * (i + 1)].contiguous().view(torch.uint16).int()
            for i in range(2)
        )
        ids = low.long()
        if self.size > 1 << 16:
            high = rest[:, 4 * self.k : 4 * self.k - (-self.k // 4)].long()
            shifts = torch.tensor([0, 2, 4, 6], device=records.device)
            ids = ids | (((high[..., None] >> shifts) & 3).flatten(1)[:, : self.k] << 16)
        below = steps * (head[:, :1] / STEPS)
        weights = torch.cat(
            [-below / temperature, head[:, 1 + self.temperatures.index(temperature), None]], -1
        )
        return ids, torch.log_softmax(weights, -1).clamp(min=MASKED)

    def lost(self, logits: Tensor, records: Tensor) -> Tensor:
        """What the records leave out, summed over n tokens: [temperatures, 2], the rest's mass, and KL from
        the whole distribution to the recorded one with the rest's mass spread evenly over its ids,
        in nats. logits: [n, v], -inf where masked.
        """
        allowed = (logits > -math.inf).sum(-1, keepdim=True)
        found = []
        for temperature in self.temperatures:
            ids, recorded = self.decode(records, temperature)
            log_p = torch.log_softmax(logits.float() / temperature, -1)
            even = recorded[:, -1:] - (allowed - self.k).clamp(min=1).log()
            spread = even.expand_as(log_p).scatter(-1, ids, recorded[:, :-1])
            terms = torch.where(log_p > -math.inf, log_p.exp() * (log_p - spread), 0.0)
            found.append(torch.stack([recorded[:, -1].exp().sum(), terms.sum()]))
        return torch.stack(found).double()


def truncated_divergence(
    ids: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    name: str,
    options: dict[str, Any],
    spare: Callable[[], Tensor],
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the divergence over k ids and "any other", and its gradient with respect to the logits
    of log_q.

    ids: [n, k]; log_p: [n, k + 1]; log_q: [n, v], overwritten by the gradient; spare: a buffer [n,
    v].
    """
    others = spare().copy_(log_q).scatter_(-1, ids, MASKED)
    rest = torch.logsumexp(others, -1, keepdim=True)
    log_p, few = log_p.to(log_q.dtype), torch.cat([log_q.gather(-1, ids), rest], -1)
    if not need_gradient:
        return FUNCTIONS[name](log_p, few, **options).sum(), None
    with torch.enable_grad():
        leaf = few.requires_grad_()
        value = FUNCTIONS[name](log_p, leaf, **options).sum()
        slope = torch.autograd.grad(value, leaf)[0]
    # d log q_i = 1 at i, and d rest = q_j / Q_rest at each other j; both less q everywhere.
    gradient = log_q.exp_().mul_(-slope.sum(-1, keepdim=True))
    gradient.addcmul_(others.sub_(rest.detach()).exp_(), slope[:, -1:])
    return value.detach(), gradient.scatter_add_(-1, ids, slope[:, :-1])


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
