"""The bootstrap (Efron and Tibshirani 1993; docs/method.md, eq. 26): how much a mean over items
would vary with other items of the same kind.

scipy.stats.bootstrap draws other samples and needs at least two items, so the recorded numbers rest
on these functions.

Shapes: n items, m resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

RESAMPLES, LEVEL = 10_000, 0.95
NUMBERS_PER_BLOCK = 1 << 22  # drawn together


def resampled_means(
    values: Floats, *, resamples: int = RESAMPLES, seed: int | Sequence[int] = 0
) -> Floats:
    """Means [m] of n items drawn with replacement from values [n]; equal seeds give equal means."""
    generator, count = np.random.default_rng(seed), len(values)
    means = np.empty(resamples)
    block = max(1, NUMBERS_PER_BLOCK // count)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        indices = generator.integers(0, count, (rows, count), dtype=np.int32)
        means[start : start + block] = values[indices].mean(1)
    return means


def percentile_interval(means: Floats) -> tuple[float, float]:
    """The percentile interval of level LEVEL, from resampled means [m]."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def two_sided_p(means: Floats) -> float:
    """Twice the fraction of resampled means [m] on the rarer side of 0.

    One is added to the count, so that no p is 0.
    """
    tail = min(int((means <= 0).sum()), int((means >= 0).sum())) + 1
    return min(1.0, 2 * tail / (len(means) + 1))
