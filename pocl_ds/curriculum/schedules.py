"""Schedules: temperature and SFT ratio by stage, learning rate by optimizer step."""

from __future__ import annotations

import math


def stage_values(stages: int, ends: tuple[float, float]) -> list[float]:
    """Linear interpolation from ends[0] to ends[1], one value per stage.

    A single stage gets ends[0]. Used for temperature and SFT ratio (docs/method.md, eq. 5 and 6).
    """
    start, end = ends
    if stages == 1:
        return [start]
    values = [start + (end - start) * i / (stages - 1) for i in range(stages - 1)]
    return [*values, end]  # the last value has no rounding error


def learning_rate(step: int, total: int, *, lr: float, min_lr: float, warmup: int = 0) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`: linear warm-up, then a cosine
    from lr to min_lr (docs/method.md, eq. 8).

    As in the POCL release, the first step after the warm-up runs at lr, and min_lr is reached after
    the last step.
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
