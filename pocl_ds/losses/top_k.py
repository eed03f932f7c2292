"""The teacher's distribution as its k largest probabilities and the mass of all others, in a few
bytes per token (docs/method.md, eq. 19).

The mass of the other ids is stored for each temperature of the plan, since it does not follow
from the mass at temperature 1. Student and teacher are then compared over k + 1 outcomes: the k
ids and "any other". For most divergences that is a lower bound of the full value (data-processing
inequality). `TopKCodec.error_sums` measures what the records leave out.

With `top_p` a token has only as many of its k most probable ids as have that probability together
at every temperature. The other slots of its record repeat its last id, and count as empty outcomes.

Shapes: n tokens, v ids that take part, k slots for ids.
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
    """Stores the k most probable ids of a token, or with `top_p` fewer, and the other ids' mass at
    each temperature.
    """

    mode: ClassVar[str] = "cached_topk"
    error_names: ClassVar[tuple[str, str]] = ("mass", "kl")

    k: int
    size: int
    temperatures: tuple[float, ...]
    top_p: float | None = None

    @property
    def label(self) -> str:
        """See `RecordCodec`."""
        limit = f" of probability {self.top_p:g}" if self.top_p else ""
        return f"top-{self.k} lists{limit}"

    @property
    def settings(self) -> str:
        """See `RecordCodec`."""
        top_p = "null" if self.top_p is None else f"{self.top_p:g}"
        return f"teacher_cache.top_k={self.k} and teacher_cache.top_p={top_p}"

    @property
    def has_unused_slots(self) -> bool:
        """See `RecordCodec`."""
        return self.top_p is not None

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
        # The k largest logits as distances from the largest one, or those of them that are stored.
        top, ids = logits.float().topk(self.k, dim=-1)
        distances = top[:, :1] - top
        if self.top_p is not None:
            stored = self._stored(logits, top, self.top_p)
            ids, distances = self._repeat_unused(ids, distances, stored)
        # The mass of all other ids at each temperature, relative to the largest logit.
        other_logits = (logits.float() - top[:, :1]).scatter_(-1, ids, -math.inf)
        masses = torch.stack(
            [torch.logsumexp(other_logits / temperature, -1) for temperature in self.temperatures],
            -1,
        )
        return self.pack(masses, ids, distances)

    def _repeat_unused(
        self, ids: Tensor, distances: Tensor, stored: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Ids and distances whose unused slots repeat the largest stored id. All: [n, k]."""
        largest = ids.masked_fill(~stored, -1).argmax(-1, keepdim=True)
        slots = torch.where(stored, torch.arange(self.k, device=ids.device), largest)
        return ids.gather(-1, slots), distances.gather(-1, slots)

    def _stored(self, logits: Tensor, top: Tensor, top_p: float) -> Tensor:
        """Which of the k largest logits [n, k] are stored [n, k]: those before a probability of
        top_p is reached, and the one that reaches it, at the temperature that needs most.
        """
        stored = torch.zeros_like(top, dtype=torch.bool)
        for temperature in self.temperatures:
            total = torch.logsumexp(logits.float() / temperature, -1, keepdim=True)
            probabilities = (top / temperature - total).exp()
            stored |= probabilities.cumsum(-1) - probabilities < top_p
        return stored

    def _unused(self, ids: Tensor) -> Tensor:
        """Which slots of records are not used: [n, k], or [1, 1] if all are. ids: [n, k]."""
        if self.top_p is None:
            return torch.zeros(1, 1, dtype=torch.bool, device=ids.device)
        return torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0))

    def encode_top(self, ids: Tensor, log_probs: Tensor, allowed: Tensor) -> Tensor:
        """Records [n, bytes] of the largest log-probabilities at temperature 1, the only one of the
        codec.

        ids: [n, m], -1 for an id that takes no part, without which the others are normalized.
        log_probs: [n, m] float64. allowed: [v], True for an id that takes part. Where fewer than k
        ids are left, further ones get an even share of the other ids' mass, at most the smallest
        of the given probabilities.
        """
        assert self.temperatures == (1.0,), "log-probabilities at 1 give no other temperature"
        # Normalize without the ids that take no part.
        probs = log_probs.exp()
        removed = probs.masked_fill(ids >= 0, 0.0).sum(-1, keepdim=True)
        logs = log_probs - torch.log1p(-removed.clamp(max=1 - 1e-6))
        smallest = logs.amin(-1).exp()  # no other id has more
        logs, order = logs.masked_fill(ids < 0, -math.inf).sort(
            dim=-1, descending=True, stable=True
        )
        ids, logs = ids.gather(-1, order)[:, : self.k].clone(), logs[:, : self.k].clone()
        other_mass = (1 - logs.exp().sum(-1)).clamp(min=torch.finfo(torch.float32).tiny)

        # Fill up short lists.
        for row in (~logs.isfinite()).any(-1).nonzero()[:, 0].tolist():
            free = allowed.clone()
            missing = ~logs[row].isfinite()
            free[ids[row][~missing]] = False
            candidates, count = free.nonzero()[:, 0], int(missing.sum())
            share = torch.minimum(other_mass[row] / len(candidates), smallest[row])
            ids[row][missing], logs[row][missing] = candidates[:count], share.log()
            other_mass[row] -= count * share
        # Store no more ids than the probability asks for.
        distances = logs[:, :1] - logs
        if self.top_p is not None:
            probs = logs.exp()
            stored = probs.cumsum(-1) - probs < self.top_p
            other_mass += probs.masked_fill(stored, 0.0).sum(-1)
            ids, distances = self._repeat_unused(ids, distances, stored)
        return self.pack(other_mass.log()[:, None] - logs[:, :1], ids, distances)

    def decode(self, records: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Ids [n, k] and log-probabilities [n, k + 1] at a temperature, MASKED in unused slots; the
        last one is that of all other ids, MASKED if there is none.

        Raises RecipeError for a temperature that the records do not hold.
        """
        index = self.temperature_index(temperature)
        masses, ids, distances = self.unpack(records)
        assert distances is not None
        # Normalize the k logits and the other ids' mass to log-probabilities.
        logits = torch.cat([-distances / temperature, masses[:, index, None]], -1)
        logits[:, :-1].masked_fill_(self._unused(ids), -math.inf)
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
        log_q_stored = log_q.gather(-1, ids).masked_fill_(self._unused(ids), MASKED)
        outcomes = torch.cat([log_q_stored, log_q_other], -1)
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
            count = self.k - self._unused(ids).sum(-1, keepdim=True)
            even = stored[:, -1:] - (allowed - count).clamp(min=1).log()
            # Unused slots come last and have the last id, so they get its value.
            slots = torch.arange(self.k, device=ids.device).minimum(count - 1)
            values = stored.gather(-1, slots.expand_as(ids))
            spread = even.expand_as(log_p).scatter(-1, ids, values)
            rows.append(torch.stack([stored[:, -1].exp().sum(), fkl(log_p, spread).sum()]))
        return torch.stack(rows).double()

    def describe_error(self, means: Sequence[float]) -> tuple[dict[str, float], str]:
        """See `RecordCodec`."""
        values = dict(zip(self.error_names, means, strict=False))
        sentence = f"the top {self.k} leave out a probability of {values['mass']:.4f}"
        if "kl" not in values:
            return values, f"{sentence} per token"
        return values, (
            f"{sentence} and {values['kl']:.4f} nats per token (KL to the records, with the rest "
            "spread evenly)"
        )
