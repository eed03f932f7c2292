"""Which samples a step sees: a pure function of (plan, seed, step).

No rank draws a random number of its own. The global batch of a step depends on neither the number
of ranks nor the micro-batch size, so another number of ranks can go on from any step. Lengths move
samples between neighbouring batches of an epoch's shuffle only, and only where a window is asked
for: the curriculum stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocl_ds.curriculum.plan import Plan

_GOLDEN, _MIX_1, _MIX_2 = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)
_BLOCK = 1 << 14  # keys mixed at once
_WINDOW = 0x57494E444F57  # sets the order of batches in a window apart from the order of samples


@dataclass(frozen=True)
class Position:
    """Where a step stands; all from 0."""

    step: int
    stage: int
    epoch: int  # of the stage
    step_in_stage: int


class Sampler:
    """Global batches of a plan, step by step or from any step.

    lengths: tokens of each sample in the plan's order. window: so many neighbouring batches of an
    epoch's shuffle exchange their samples until each holds like lengths; they then come in shuffled
    order. Every sample stays within its window.
    """

    def __init__(
        self, plan: Plan, seed: int, *, lengths: NDArray[np.int64] | None = None, window: int = 1
    ) -> None:
        if window > 1 and lengths is None:
            raise ValueError("a length window needs the lengths")
        self.plan, self.seed, self.lengths, self.window = plan, seed, lengths, window
        self._ends = np.cumsum([stage.steps for stage in plan.stages])
        self._epoch: tuple[int, int] | None = None
        self._shuffled: NDArray[np.int64] = np.empty(0, np.int64)

    def at(self, step: int) -> Position:
        """Stage and epoch of a global step."""
        if not 0 <= step < self.plan.total_steps:
            raise IndexError(f"step {step} is outside the plan's {self.plan.total_steps} steps")
        index = int(np.searchsorted(self._ends, step, side="right"))
        stage = self.plan.stages[index]
        in_stage = step - int(self._ends[index]) + stage.steps
        return Position(step, index, in_stage // stage.steps_per_epoch, in_stage)

    def batch(self, step: int) -> NDArray[np.int64]:
        """Positions into the plan's order of a step's global batch: [batch_size], shuffled.

        A padded tail is filled with the first samples of the epoch's own shuffle, from its start as
        often as needed.
        """
        position = self.at(step)
        stage = self.plan.stages[position.stage]
        if self._epoch != (position.stage, position.epoch):
            self._shuffled = permutation(
                stage.samples, seed=self.seed, stage=position.stage, epoch=position.epoch
            )
            self._shuffled += stage.start
            self._epoch = (position.stage, position.epoch)
        number = position.step_in_stage % stage.steps_per_epoch
        if self.lengths is None or self.window == 1:
            return self._neighbours(number, 1)
        first = number - number % self.window
        count = min(self.window, stage.steps_per_epoch - first)
        rows = self._neighbours(first, count)
        batches = rows[np.argsort(self.lengths[rows], kind="stable")].reshape(count, -1)
        order = permutation(
            count,
            seed=self.seed ^ _WINDOW,
            stage=position.stage,
            epoch=position.epoch * stage.steps_per_epoch + first,
        )
        return batches[order[number - first]]

    def _neighbours(self, first: int, count: int) -> NDArray[np.int64]:
        """The epoch's shuffle from batch `first`, `count` batches long."""
        size = self.plan.batch_size
        picked = self._shuffled[first * size : (first + count) * size]
        if len(picked) < count * size:
            picked = np.concatenate([picked, np.resize(self._shuffled, count * size - len(picked))])
        return picked


def permutation(size: int, *, seed: int, stage: int, epoch: int) -> NDArray[np.int64]:
    """A shuffle of 0 .. size-1 that follows from its arguments by arithmetic alone.

    Number i is sorted by the high bits of splitmix64(base + i), then by i itself, which stands in
    the low bits of its key: no two keys are equal, so any sort gives one result, on every machine
    and with every release of numpy. Sorting keys in place takes half the time of argsort.
    """
    low = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    with np.errstate(over="ignore"):
        base = np.uint64(0)
        for word in (seed, stage, epoch):
            base = _mix(np.array([base + np.uint64(word) + _GOLDEN], np.uint64))[0]
        keys = np.arange(size, dtype=np.uint64)
        for start in range(0, size, _BLOCK):
            numbers = keys[start : start + _BLOCK]
            numbers |= _mix(numbers + base) & ~low
    keys.sort()
    keys &= low
    return keys.view(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's output function."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
