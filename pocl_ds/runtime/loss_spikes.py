"""Detection of loss spikes."""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 32  # losses of the same stage that a new one is compared with
MIN_LOSSES = 12  # with fewer, no loss counts as a spike
MIN_DEVIATIONS = 8.0  # a spike is above the median by so many standard deviations ...
MIN_RELATIVE_RISE = 0.2  # ... and by this share of the median


class LossSpikes:
    """Detects losses that jump above the median of the recent losses of the stage."""

    def __init__(self) -> None:
        self._stage: int | None = None
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def update(self, loss: float, stage: int) -> float | None:
        """Add the loss of an optimizer step.

        Returns its ratio to the median of the recent losses if it is a spike, else None.
        """
        if stage != self._stage:
            self._stage = stage
            self._recent.clear()
        ratio = None
        if len(self._recent) >= MIN_LOSSES:
            center = median(self._recent)
            # 1.4826 x the median absolute deviation estimates a normal standard deviation.
            deviation = 1.4826 * median(abs(value - center) for value in self._recent)
            if loss > center + max(MIN_DEVIATIONS * deviation, MIN_RELATIVE_RISE * center):
                ratio = loss / center
        self._recent.append(loss)
        return ratio
