"""What rises and falls over a run: temperature and SFT ratio by stage, the learning rate by step
(METHOD 2).
"""

from __future__ import annotations

import math


def stage_values(stages: int, ends: tuple[float, float]) -> list[float]:
    """`stages` values on the line from ends[0] to ends[1]. A single stage takes the first."""
    first, last = ends
    if stages == 1:
        return [first]
    return [first + (last - first) * i / (stages - 1) for i in range(stages - 1)] + [
        last
    ]  # the last to the last bit


def learning_rate(step: int, total: int, *, lr: float, min_lr: float, warmup: int = 0) -> float:
    """Learning rate of step `step` (from 0) of `total`: linear warm-up, then a cosine from lr to
    min_lr.

    As in the release: the first step after the warm-up runs at lr, and min_lr is reached after the
    last one.
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(total - warmup, 1)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
