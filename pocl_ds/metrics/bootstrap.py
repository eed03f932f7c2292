"""How far a mean over items would move with other items of the same kind: the bootstrap (Efron and
Tibshirani 1993). Pure.

Shapes: n items, m resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

RESAMPLES, LEVEL = 10_000, 0.95
BLOCK = 1 << 22  # numbers drawn at once


def resampled_means(
    values: Floats, *, resamples: int = RESAMPLES, seed: int | Sequence[int] = 0
) -> Floats:
    """Means [m] of n items drawn with replacement from values [n]; equal arguments give equal
    draws.
    """
    generator, count = np.random.default_rng(seed), len(values)
    found = np.empty(resamples)
    step = max(1, BLOCK // count)
    for first in range(0, resamples, step):
        drawn = generator.integers(0, count, (min(step, resamples - first), count), dtype=np.int32)
        found[first : first + step] = values[drawn].mean(1)
    return found


def percentile_interval(means: Floats) -> tuple[float, float]:
    """The percentile interval of LEVEL, from resampled means [m]."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def two_sided_p(means: Floats) -> float:
    """Twice the share of resampled means [m] on the rarer side of 0, as the interval has it; one is
    added so that no p is 0.
    """
    tail = min(int((means <= 0).sum()), int((means >= 0).sum())) + 1
    return min(1.0, 2 * tail / (len(means) + 1))
