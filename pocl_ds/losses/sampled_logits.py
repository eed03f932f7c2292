"""The teacher's distribution as ids drawn from it (docs/method.md, eq. 32): the random sampling of
Sparse Logit Sampling (arXiv 2503.16870), for every temperature of the plan.

With ids v_1 ... v_m drawn from a proposal pi, p_hat = 1/m sum_j (p / pi)(v_j) at v_j is an estimate
of p at each temperature. Unbiased: E[p_hat(v)] = pi(v) (p / pi)(v) = p(v). The value
sum_j p_hat (log p - log q) and its gradient |p_hat| q - p_hat, with |p_hat| the sum of p_hat, are
linear in p_hat, and E |p_hat| = 1: in expectation they are the forward KL and its gradient q - p.
A normalized p_hat / |p_hat| would be biased, and so is a divergence whose gradient is not linear in
p.

pi is the mean of p over the temperatures of the records, so that no weight p / pi exceeds their
number. With temperature 1 alone, pi is p and every weight 1, as in the paper, and a record needs no
logits. Draw j comes from the j-th of m equal parts of the cumulative distribution. The estimate of
any sum over ids then has at most the variance of independent draws, since the variance within the
parts is all that remains.

Shapes: n tokens, v ids that take part, m draws, t temperatures.
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

from pocl_ds.config.registry import SAMPLED_LOSS
from pocl_ds.errors import RecipeError
from pocl_ds.losses.divergences import compute_dtype
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.runtime.hashing import GOLDEN_GAMMA, splitmix64


@dataclass(frozen=True)
class SampledCodec(RecordCodec):
    """Stores `num_samples` ids of a token, drawn with replacement, in ascending order; an id that
    was drawn c times is there c times.

    A logit is rounded to 1 / DISTANCE_STEPS of the largest distance in its record, D nats. This
    changes a weight by a factor of at most exp(D / (2 DISTANCE_STEPS)): 1.0002 for 25 nats.
    """

    mode: ClassVar[str] = "cached_sampled"
    error_names: ClassVar[tuple[str, str]] = ("gradient_error", "unique_ids")

    num_samples: int
    size: int
    temperatures: tuple[float, ...]

    @property
    def label(self) -> str:
        """See `RecordCodec`."""
        return f"{self.num_samples} sampled ids"

    @property
    def settings(self) -> str:
        """See `RecordCodec`."""
        return f"teacher_cache.num_samples={self.num_samples}"

    @property
    def slots(self) -> int:
        """See `RecordCodec`."""
        return self.num_samples

    @property
    def header_size(self) -> int:
        """See `RecordCodec`: the logarithm of the softmax's denominator at each temperature; at one
        temperature the mean of log p over the draws.
        """
        return len(self.temperatures)

    @property
    def has_distances(self) -> bool:
        """See `RecordCodec`. At one temperature every weight is 1."""
        return len(self.temperatures) > 1

    def encode(self, logits: Tensor, keys: NDArray[np.uint64]) -> Tensor:
        """See `RecordCodec`."""
        # The cumulative proposal, in float64 so that no id is lost to rounding.
        logits = logits.to(compute_dtype(logits.dtype))
        distances = logits.amax(-1, keepdim=True) - logits
        proposal, sums = torch.zeros_like(distances, dtype=torch.float64), []
        for temperature in self.temperatures:
            exponentials = (distances / -temperature).exp_()
            sums.append(exponentials.sum(-1, keepdim=True, dtype=torch.float64))
            proposal += exponentials.div_(sums[-1])
        cumulative = proposal.cumsum_(-1)
        # The first id whose cumulative probability exceeds a point, never one without probability.
        points = torch.from_numpy(stratified_points(keys, self.num_samples)).to(logits.device)
        ids = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
        drawn, header = distances.gather(-1, ids), torch.cat(sums, -1).log()
        if self.has_distances:
            return self.pack(header, ids, drawn.float())
        log_p = -drawn / self.temperatures[0] - header
        return self.pack(log_p.mean(-1, keepdim=True), ids, None)

    def decode(self, records: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Drawn ids [n, m] and the parts of p_hat at them [n, m], at a temperature; and the sum of
        p_hat log p [n].

        Raises RecipeError for a temperature that the records do not hold.
        """
        index = self.temperature_index(temperature)
        header, ids, distances = self.unpack(records)
        if distances is None:
            return ids, torch.full_like(ids, 1 / self.num_samples, dtype=header.dtype), header[:, 0]
        inverses = header.new_tensor([1 / value for value in self.temperatures])
        log_p = -distances[..., None] * inverses - header[:, None]  # [n, m, t]
        log_proposal = torch.logsumexp(log_p, -1) - math.log(len(self.temperatures))
        parts = (log_p[..., index] - log_proposal).exp() / self.num_samples
        return ids, parts, (parts * log_p[..., index]).sum(-1)

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
        """See `RecordCodec`. An unbiased estimate, so that the value of few tokens may be negative;
        it is 0 where p = q.
        """
        if name != SAMPLED_LOSS:
            raise RecipeError(
                f"{self.label} estimate loss.name={SAMPLED_LOSS} without bias, since its gradient "
                f"is linear in the teacher's probabilities, and would bias loss.name={name}"
            )
        ids, parts, teacher_sum = (
            part.to(log_q.dtype) if part.is_floating_point() else part
            for part in self.decode(records, temperature)
        )
        value = teacher_sum - (parts * log_q.gather(-1, ids)).sum(-1)
        if not need_gradient:
            return value, None
        gradient = log_q.exp_().mul_(parts.sum(-1, keepdim=True))
        return value, gradient.scatter_add_(-1, ids, parts.neg_())

    def error_sums(self, logits: Tensor, records: Tensor) -> Tensor:
        """See `RecordCodec`. The columns are the squared length of the gradient in the logits of a
        student with q = p, which is 0 without sampling, and the number of different ids.
        """
        rows = []
        for temperature in self.temperatures:
            ids, parts, _ = self.decode(records, temperature)
            error = torch.softmax(logits.float() / temperature, -1)
            error.mul_(parts.sum(-1, keepdim=True)).scatter_add_(-1, ids, -parts)
            unique = len(ids) + (ids[:, 1:] != ids[:, :-1]).sum()
            rows.append(torch.stack([error.square().sum(), unique.to(error.dtype)]))
        return torch.stack(rows).double()

    def describe_error(self, means: Sequence[float]) -> tuple[dict[str, float], str]:
        """See `RecordCodec`; the squared length becomes a root mean square."""
        error, unique = math.sqrt(means[0]), means[1]
        return dict(zip(self.error_names, (error, unique), strict=True)), (
            f"{self.num_samples} draws give {unique:.1f} different ids per token and a gradient "
            f"whose error has a length of {error:.4f} (root mean square; the gradient is q - p)"
        )


def stratified_points(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Random numbers [n, count] in (0, 1), ascending: one in each of `count` equal parts.

    keys: [n]. A row depends on its key alone: splitmix64 mixes the key and the column.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN_GAMMA
    mixed = splitmix64(keys[:, None] + steps)
    # 32 bits of each number and half a step: never 0 or 1.
    uniform = ((mixed >> np.uint64(32)).astype(np.float64) + 0.5) / 2.0**32
    points: NDArray[np.float64] = (np.arange(count) + uniform) / count
    return points
