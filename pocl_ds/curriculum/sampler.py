"""The sampler: which samples an optimizer step uses, as a pure function of (plan, seed, step).

No rank has a random generator. The global batch of a step depends on neither the number of
ranks nor the micro-batch size, so another number of ranks can continue from any step. A length
window moves samples between neighboring batches of an epoch only; the curriculum stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.curriculum.plan import Plan, Stage
from pocl_ds.runtime.hashing import GOLDEN_GAMMA, splitmix64

_KEYS_PER_BLOCK = 1 << 14  # mixed together, so that they stay in the cache
_WINDOW_SEED = 0x57494E444F57  # separates the order of batches in a window from that of samples


@dataclass(frozen=True)
class SamplerPosition:
    """The place of an optimizer step in the plan; all numbers count from 0."""

    step: int
    stage: int
    epoch: int  # of the stage
    step_in_stage: int


class Sampler:
    """The global batch of every optimizer step of a plan, in any order of steps.

    With a window, that many consecutive batches of an epoch's shuffle exchange samples until each
    holds samples of similar length; these batches come in shuffled order.
    """

    def __init__(
        self, plan: Plan, seed: int, *, lengths: NDArray[np.int64] | None = None, window: int = 1
    ) -> None:
        """lengths: tokens of each dataset row, [rows]; required if window > 1, where the plan's
        order holds row numbers.
        """
        if window > 1 and lengths is None:
            raise ValueError("a length window needs the lengths of the samples")
        self.plan, self.seed, self.lengths, self.window = plan, seed, lengths, window
        self._stage_ends = np.cumsum([stage.steps for stage in plan.stages])
        # The shuffle of the most recent epoch.
        self._epoch: tuple[int, int] | None = None
        self._shuffled: NDArray[Any] = np.empty(0, np.int64)

    def replace_stage(self, stage: Stage) -> None:
        """Use another order of samples in a stage, from now on. The stage must not have begun."""
        self.plan.stages[stage.index] = stage
        self._epoch = None

    def position(self, step: int) -> SamplerPosition:
        """Stage and epoch of a global step. Raises IndexError for a step outside the plan."""
        if not 0 <= step < self.plan.total_steps:
            raise IndexError(f"step {step} is outside the plan's {self.plan.total_steps} steps")
        index = int(np.searchsorted(self._stage_ends, step, side="right"))
        stage = self.plan.stages[index]
        step_in_stage = step - int(self._stage_ends[index]) + stage.steps
        return SamplerPosition(step, index, step_in_stage // stage.steps_per_epoch, step_in_stage)

    def batch(self, step: int) -> NDArray[Any]:
        """The samples of a step's global batch, as the plan's order names them: [batch_size].

        With drop_last=False, samples from the start of the epoch's shuffle fill the last batch.
        Raises IndexError for a step outside the plan.
        """
        # Shuffle the stage's samples, once for each epoch.
        position = self.position(step)
        stage = self.plan.stages[position.stage]
        if self._epoch != (position.stage, position.epoch):
            places = permutation(
                stage.num_samples, seed=self.seed, stage=position.stage, epoch=position.epoch
            )
            self._shuffled = np.asarray(stage.sample_ids)[places]
            self._epoch = (position.stage, position.epoch)

        batch_number = position.step_in_stage % stage.steps_per_epoch
        if self.lengths is None or self.window == 1:
            return self._consecutive_batches(batch_number, 1)

        # Sort the samples of the window by length, and shuffle the resulting batches.
        window_start = batch_number - batch_number % self.window
        count = min(self.window, stage.steps_per_epoch - window_start)
        samples = self._consecutive_batches(window_start, count)
        by_length = np.argsort(self.lengths[samples], kind="stable")
        batches = samples[by_length].reshape(count, -1)
        order = permutation(
            count,
            seed=self.seed ^ _WINDOW_SEED,
            stage=position.stage,
            epoch=position.epoch * stage.steps_per_epoch + window_start,
        )
        return batches[order[batch_number - window_start]]

    def _consecutive_batches(self, start: int, count: int) -> NDArray[Any]:
        """The samples of `count` batches of the epoch's shuffle, from batch `start`."""
        size = self.plan.batch_size
        samples = self._shuffled[start * size : (start + count) * size]
        missing = count * size - len(samples)
        if missing:
            samples = np.concatenate([samples, np.resize(self._shuffled, missing)])
        return samples


def permutation(size: int, *, seed: int, stage: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of 0 .. size-1, computed from the arguments by integer arithmetic alone.

    Number i gets a key: the high bits of splitmix64(base + i), and i itself in the low bits. No two
    keys are equal, so every sorting algorithm gives the same result, on every machine and with
    every release of numpy. Sorting the keys in place takes half the time of argsort.
    """
    low_bits = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    with np.errstate(over="ignore"):
        base = np.uint64(0)
        for word in (seed, stage, epoch):
            base = splitmix64(np.array([base + np.uint64(word) + GOLDEN_GAMMA], np.uint64))[0]
        keys = np.arange(size, dtype=np.uint64)
        for start in range(0, size, _KEYS_PER_BLOCK):
            block = keys[start : start + _KEYS_PER_BLOCK]
            block |= splitmix64(block + base) & ~low_bits
    keys.sort()
    keys &= low_bits
    return keys.view(np.int64)
