"""The plan divides an order of samples, easiest first, into stages. It is independent of ranks.

A stage is a slice of the order. With baby_step, stage i trains on subsets 0 to i; with one_pass, on
subset i alone; with all_samples, on all subsets.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocl_ds.curriculum.schedules import stage_values
from pocl_ds.errors import ArtifactError, DataError, RecipeError

SCHEDULERS = ("baby_step", "one_pass", "all_samples")

SampleOrder: TypeAlias = "Sequence[Any] | NDArray[np.int64]"  # ids or rows, easiest first
Epochs: TypeAlias = "int | tuple[int, ...]"  # one number for all stages, or one per stage


@dataclass(frozen=True)
class Stage:
    """One stage: the samples order[start:stop], their temperature and SFT ratio, and its length."""

    index: int
    start: int
    stop: int
    temperature: float
    sft_ratio: float
    epochs: int
    steps_per_epoch: int  # optimizer steps
    steps: int  # optimizer steps of the stage; may end within its last epoch
    order: SampleOrder = field(repr=False, compare=False)
    # Weight of each dataset row in the loss, [rows] float32, with mean 1 over the stage's samples;
    # None if all are 1.
    weights: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    @property
    def num_samples(self) -> int:
        """Samples of one epoch, before drop_last drops an incomplete batch."""
        return self.stop - self.start

    @property
    def sample_ids(self) -> SampleOrder:
        """The stage's part of the order, easiest first: [num_samples]."""
        return self.order[self.start : self.stop]


@dataclass(frozen=True)
class Plan:
    """The stages of one training run."""

    stages: list[Stage]
    batch_size: int
    scheduler: str
    drop_last: bool

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values, without the order, which is stored in its own file."""
        stages = []
        for stage in self.stages:
            tree = asdict(replace(stage, order=(), weights=None))
            stages.append({k: v for k, v in tree.items() if k not in ("order", "weights")})
        return {
            "samples": self.stages[-1].stop,
            "batch_size": self.batch_size,
            "scheduler": self.scheduler,
            "drop_last": self.drop_last,
            "total_steps": self.total_steps,
            "stages": stages,
        }

    @classmethod
    def from_json(
        cls,
        tree: dict[str, Any],
        order: SampleOrder,
        sample_weights: NDArray[np.float32] | None = None,
    ) -> Plan:
        """The inverse of `to_json`. sample_weights: see `build_plan`. Raises ArtifactError if the
        order has another length.
        """
        order = leave_out(order, sample_weights)
        stages = [Stage(**stage, order=order) for stage in tree["stages"]]
        if stages[-1].stop != len(order):
            raise ArtifactError(
                f"the plan was made for {stages[-1].stop} samples and the ranking holds "
                f"{len(order)}: remove plan/ and run `pocl plan` again"
            )
        stages = [_with_weights(stage, sample_weights) for stage in stages]
        return cls(stages, tree["batch_size"], tree["scheduler"], tree["drop_last"])

    def with_order(
        self, index: int, order: SampleOrder, sample_weights: NDArray[np.float32] | None = None
    ) -> Stage:
        """Stage `index` with another order of samples. It keeps its number of optimizer steps, so
        fewer samples mean more epochs.

        order: rows, easiest first; sample_weights: see `build_plan`. Raises RecipeError if the
        samples do not fill one batch.
        """
        stage, order = self.stages[index], leave_out(order, sample_weights)
        num_subsets = len(self.stages)
        if len(order) < num_subsets:
            raise RecipeError(
                f"curriculum.sample_weights keep {len(order)} samples for {num_subsets} stages: "
                "leave fewer out"
            )
        start, stop = _stage_bounds(len(order), num_subsets, index, self.scheduler)
        steps_per_epoch = _batches_per_epoch(stop - start, self.batch_size, self.drop_last)
        if steps_per_epoch == 0:
            raise _too_few_samples(index, stop - start, self.batch_size)
        return _with_weights(
            replace(
                stage,
                start=start,
                stop=stop,
                epochs=-(-stage.steps // steps_per_epoch),
                steps_per_epoch=steps_per_epoch,
                order=order,
            ),
            sample_weights,
        )


def build_plan(
    order: SampleOrder,
    *,
    num_subsets: int = 4,
    epochs_per_stage: Epochs = 8,
    batch_size: int = 64,
    temperature: tuple[float, float] = (1.0, 2.0),
    sft_ratio: tuple[float, float] = (0.3, 0.0),
    scheduler: str = "baby_step",
    drop_last: bool = True,
    sample_weights: NDArray[np.float32] | None = None,
) -> Plan:
    """Divide an order of samples into the stages of a curriculum (POCL, arXiv 2506.05695).

    Sizes, temperature, SFT ratio and optimizer steps follow docs/method.md, eq. 4 to 7.

    Args:
        order: sample ids or rows, easiest first, [samples].
        num_subsets: number of subsets, and so of stages.
        epochs_per_stage: one number for all stages, or one per stage.
        batch_size: samples of an optimizer step, over all ranks.
        temperature: distillation temperature of the first and the last stage.
        sft_ratio: weight of cross-entropy in the first and the last stage, 0 to 1.
        scheduler: `baby_step` (subsets accumulate), `one_pass` (each subset alone) or
            `all_samples`.
        drop_last: drop the incomplete last batch of an epoch, else fill it up.
        sample_weights: weight of each dataset row in the loss, [rows]; `order` then holds row
            numbers. 0 leaves a sample out of every stage.

    Raises:
        DataError: a weight is negative or not finite, or all are 0.
        RecipeError: a value is out of range, or a stage does not fill one batch.
    """
    # Check the values, and compute what changes from stage to stage.
    order = leave_out(order, sample_weights)
    total = len(order)
    epochs = stage_epochs(num_subsets, epochs_per_stage)
    _validate(total, num_subsets, epochs, batch_size, temperature, sft_ratio, scheduler)
    temperatures = stage_values(num_subsets, temperature)
    sft_ratios = stage_values(num_subsets, sft_ratio)

    # A stage is a slice of the order that ends where its subset does.
    stages = []
    for i in range(num_subsets):
        start, stop = _stage_bounds(total, num_subsets, i, scheduler)
        steps_per_epoch = _batches_per_epoch(stop - start, batch_size, drop_last)
        if steps_per_epoch == 0:
            raise _too_few_samples(i, stop - start, batch_size)
        stages.append(
            Stage(
                index=i,
                start=start,
                stop=stop,
                temperature=temperatures[i],
                sft_ratio=sft_ratios[i],
                epochs=epochs[i],
                steps_per_epoch=steps_per_epoch,
                steps=epochs[i] * steps_per_epoch,
                order=order,
            )
        )
    stages = [_with_weights(stage, sample_weights) for stage in stages]
    return Plan(stages, batch_size, scheduler, drop_last)


def leave_out(order: SampleOrder, sample_weights: NDArray[np.float32] | None) -> SampleOrder:
    """The order without the samples whose weight is 0. Raises DataError for weights that are
    negative or not finite, and if all are 0.
    """
    if sample_weights is None:
        return order
    rows = np.asarray(order)
    weights = sample_weights[rows]
    if problem := weights_problem(weights, lambda place: f"the sample in row {rows[place]}"):
        raise DataError(problem)
    return rows[weights > 0]


def weights_problem(weights: NDArray[Any], sample_name: Callable[[int], str]) -> str | None:
    """What is wrong with the weights of samples, [samples]; None if nothing is.

    sample_name: what the sentence calls the sample at an index.
    """
    valid = np.isfinite(weights) & (weights >= 0)
    if not valid.all():
        wrong = int(np.argmin(valid))
        return (
            f"{sample_name(wrong)} has weight {weights[wrong]:g}: a weight must be a finite "
            "number, at least 0, and 0 leaves the sample out"
        )
    return None if weights.any() else "every sample has weight 0, so that none is left: keep some"


def _with_weights(stage: Stage, sample_weights: NDArray[np.float32] | None) -> Stage:
    """The stage with its samples' weights, scaled to a mean of 1; None if they are all equal."""
    if sample_weights is None:
        return stage
    weights = sample_weights[np.asarray(stage.sample_ids)]
    if (weights == weights[0]).all():
        return stage
    mean = weights.mean(dtype=np.float64)
    return replace(stage, weights=(sample_weights / mean).astype(np.float32))


def _stage_bounds(total: int, num_subsets: int, index: int, scheduler: str) -> tuple[int, int]:
    """Where the samples of a stage begin and end in an order of `total` samples."""
    if scheduler == "all_samples":
        return 0, total
    stops = subset_stops(total, num_subsets)
    return 0 if scheduler == "baby_step" or index == 0 else stops[index - 1], stops[index]


def _too_few_samples(stage: int, samples: int, batch_size: int) -> RecipeError:
    return RecipeError(
        f"stage {stage} has {samples} samples, fewer than train.batch_size={batch_size}: make "
        "fewer subsets (curriculum.num_subsets), smaller batches, or set curriculum.drop_last=false"
    )


def subset_stops(total: int, num_subsets: int) -> list[int]:
    """Where each subset of an order of `total` samples ends (docs/method.md, eq. 4)."""
    return [*((i + 1) * (total // num_subsets) for i in range(num_subsets - 1)), total]


def stage_epochs(num_subsets: int, epochs_per_stage: Epochs) -> tuple[int, ...]:
    """The epochs of each stage."""
    if isinstance(epochs_per_stage, tuple):
        return epochs_per_stage
    return (epochs_per_stage,) * num_subsets


def mean_sample_visits(num_subsets: int, epochs_per_stage: Epochs, scheduler: str) -> float:
    """How often training uses a sample, on average; samples that drop_last drops count too."""
    epochs = stage_epochs(num_subsets, epochs_per_stage)
    # Subsets of each stage, as whole numbers, so that the sum is exact.
    subsets = {
        "baby_step": range(1, num_subsets + 1),
        "one_pass": (1,) * num_subsets,
        "all_samples": (num_subsets,) * num_subsets,
    }
    return sum(map(operator.mul, epochs, subsets[scheduler])) / num_subsets


def single_stage_plan(
    order: SampleOrder,
    *,
    steps: int,
    batch_size: int,
    temperature: float,
    sft_ratio: float,
    drop_last: bool = True,
) -> Plan:
    """Plan `steps` optimizer steps over all samples in one stage: plain KD, for the baseline and
    for healing.

    The last epoch may be incomplete. Raises RecipeError as `build_plan` does.
    """
    total = len(order)
    constant_schedules = (temperature, temperature), (sft_ratio, sft_ratio)
    _validate(total, 1, (1,), batch_size, *constant_schedules, "baby_step")
    steps_per_epoch = _batches_per_epoch(total, batch_size, drop_last)
    if steps < 1:
        raise RecipeError(f"a plan of {steps} steps trains nothing: ask for at least 1")
    if steps_per_epoch == 0:
        raise RecipeError(
            f"{total} samples do not fill one batch of train.batch_size={batch_size}: make it "
            "smaller"
        )
    epochs = -(-steps // steps_per_epoch)
    stage = Stage(0, 0, total, temperature, sft_ratio, epochs, steps_per_epoch, steps, order)
    return Plan([stage], batch_size, "baby_step", drop_last)


def _batches_per_epoch(samples: int, batch_size: int, drop_last: bool) -> int:
    return samples // batch_size if drop_last else -(-samples // batch_size)


def _validate(
    total: int,
    num_subsets: int,
    epochs: tuple[int, ...],
    batch_size: int,
    temperature: tuple[float, float],
    sft_ratio: tuple[float, float],
    scheduler: str,
) -> None:
    """Raise RecipeError for a value that no plan can have."""
    # Numbers of subsets, epochs and samples.
    if num_subsets < 1 or num_subsets > total:
        raise RecipeError(
            f"curriculum.num_subsets={num_subsets} for {total} samples: make it at least 1 and at "
            "most one for each sample"
        )
    if len(epochs) != num_subsets:
        raise RecipeError(
            f"curriculum.epochs_per_stage={list(epochs)} for curriculum.num_subsets={num_subsets}: "
            "give one number for each stage"
        )
    if min(epochs) < 1 or batch_size < 1:
        raise RecipeError(
            f"curriculum.epochs_per_stage={min(epochs)} and train.batch_size={batch_size} must be "
            "at least 1"
        )
    # Values of the schedules.
    if not all(0 < value < math.inf for value in temperature):
        raise RecipeError(
            f"curriculum.temperature={list(temperature)}: a temperature must be a number greater "
            "than 0, as in [1.0, 2.0]"
        )
    if not all(0 <= value <= 1 for value in sft_ratio):
        raise RecipeError(
            f"curriculum.sft_ratio={list(sft_ratio)}: a ratio must be between 0 and 1"
        )
    if scheduler not in SCHEDULERS:
        raise RecipeError(f"curriculum.scheduler={scheduler!r}: use {', '.join(SCHEDULERS)}")
