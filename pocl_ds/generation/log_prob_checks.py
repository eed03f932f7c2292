"""Checks of a teacher's largest log-probabilities that come from outside."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Sums of probabilities that differ from a distribution's by rounding alone.
PROBABILITY_TOLERANCE = 1e-3


def log_prob_problem(ids: NDArray[Any], log_probs: NDArray[Any]) -> str | None:
    """What shows that these are not the largest log-probabilities of distributions, as a part of a
    sentence; None if nothing does.

    ids, log_probs: [n, k], one distribution in each row, in descending order.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        masses = np.exp(log_probs).sum(-1)
        descending = not (np.diff(log_probs, axis=-1) > 0).any()
    if not np.isfinite(log_probs).all() or not descending:
        return "values that are not log-probabilities in descending order"
    if (masses > 1 + PROBABILITY_TOLERANCE).any():
        return "probabilities that sum to more than 1"
    if (np.diff(np.sort(ids, -1), axis=-1) == 0).any():
        return "an id that appears twice at one position"
    return None
