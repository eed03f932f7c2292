"""The plan: from an order, easiest first, to stages (METHOD 2). Nothing here knows of ranks.

A stage is a slice of the order: Baby Step trains stage i on everything up to subset i, One Pass on
subset i alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocl_ds.curriculum.schedules import stage_values
from pocl_ds.errors import ArtifactError, RecipeError

Order: TypeAlias = "Sequence[Any] | NDArray[np.int64]"  # ids or rows, easiest first
Epochs: TypeAlias = "int | tuple[int, ...]"  # of all stages alike, or of each


@dataclass(frozen=True)
class Stage:
    """One stage: order[start:stop], its temperature and SFT ratio, its optimizer steps."""

    index: int
    start: int
    stop: int
    temperature: float
    sft_ratio: float
    epochs: int
    steps_per_epoch: int
    steps: int  # may end within the last epoch
    order: Order = field(repr=False, compare=False)

    @property
    def samples(self) -> int:
        """Samples of one epoch, the dropped tail included."""
        return self.stop - self.start

    @property
    def sample_ids(self) -> Order:
        """Ids of the stage's samples, easiest first."""
        return self.order[self.start : self.stop]


@dataclass(frozen=True)
class Plan:
    """All stages of a training."""

    stages: list[Stage]
    batch_size: int
    scheduler: str
    drop_last: bool

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(stage.steps for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The plan without the order, which lies in a file of its own."""
        stages = []
        for stage in self.stages:
            tree = asdict(Stage(**{**stage.__dict__, "order": ()}))
            stages.append({name: value for name, value in tree.items() if name != "order"})
        return {
            "samples": self.stages[-1].stop,
            "batch_size": self.batch_size,
            "scheduler": self.scheduler,
            "drop_last": self.drop_last,
            "total_steps": self.total_steps,
            "stages": stages,
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any], order: Order) -> Plan:
        """The plan that `to_json` described, over its order. Raises ArtifactError where it is of
        another order's length.
        """
        stages = [Stage(**stage, order=order) for stage in tree["stages"]]
        if stages[-1].stop != len(order):
            raise ArtifactError(
                f"the plan was made for {stages[-1].stop} samples and the ranking holds "
                f"{len(order)}: "
                "remove plan/ and run `pocl plan` again"
            )
        return cls(stages, tree["batch_size"], tree["scheduler"], tree["drop_last"])


def build_plan(
    order: Order,
    *,
    num_subsets: int = 4,
    epochs_per_stage: Epochs = 8,
    batch_size: int = 64,
    temperature: tuple[float, float] = (1.0, 2.0),
    sft_ratio: tuple[float, float] = (0.3, 0.0),
    scheduler: str = "baby_step",
    drop_last: bool = True,
) -> Plan:
    """Cut an order (ids, easiest first) into stages.

    Stage i ends where subset i does (`subset_stops`). Steps are epochs * floor(samples /
    batch_size), or the ceiling where drop_last=False fills the last batch of an epoch up. Raises
    RecipeError, one sentence.
    """
    total = len(order)
    epochs = stage_epochs(num_subsets, epochs_per_stage)
    _check(total, num_subsets, epochs, batch_size, temperature, sft_ratio, scheduler, drop_last)
    stages, stops = [], subset_stops(total, num_subsets)
    for i, (stage_temperature, stage_sft_ratio) in enumerate(
        zip(
            stage_values(num_subsets, temperature),
            stage_values(num_subsets, sft_ratio),
            strict=True,
        )
    ):
        start = 0 if scheduler == "baby_step" or i == 0 else stops[i - 1]
        stop = stops[i]
        per_epoch = _batches(stop - start, batch_size, drop_last)
        if per_epoch == 0:
            raise RecipeError(
                f"stage {i} has {stop - start} samples, fewer than train.batch_size={batch_size}: "
                f"make fewer subsets "
                "(curriculum.num_subsets), smaller batches, or set curriculum.drop_last=false"
            )
        stages.append(
            Stage(
                i,
                start,
                stop,
                stage_temperature,
                stage_sft_ratio,
                epochs[i],
                per_epoch,
                epochs[i] * per_epoch,
                order,
            )
        )
    return Plan(stages, batch_size, scheduler, drop_last)


def subset_stops(total: int, num_subsets: int) -> list[int]:
    """Where each subset of an order ends: (i + 1) * floor(N / num_subsets), the last at N (METHOD 2)."""
    return [*((i + 1) * (total // num_subsets) for i in range(num_subsets - 1)), total]


def stage_epochs(num_subsets: int, epochs_per_stage: Epochs) -> tuple[int, ...]:
    """The epochs of each stage."""
    return (
        epochs_per_stage
        if isinstance(epochs_per_stage, tuple)
        else (epochs_per_stage,) * num_subsets
    )


def visits(num_subsets: int, epochs_per_stage: Epochs, scheduler: str) -> float:
    """How often a sample is seen over all stages, on average; dropped tails count."""
    epochs = stage_epochs(num_subsets, epochs_per_stage)
    shares = (
        i + 1 if scheduler == "baby_step" else 1 for i in range(num_subsets)
    )  # of `num_subsets`, as whole numbers: exact
    return sum(map(operator.mul, epochs, shares)) / num_subsets


def single_stage_plan(
    order: Order,
    *,
    steps: int,
    batch_size: int,
    temperature: float,
    sft_ratio: float,
    drop_last: bool = True,
) -> Plan:
    """One stage over all samples for `steps` optimizer steps, the last epoch cut: plain KD, for
    baseline and healing.
    """
    _check(
        len(order),
        1,
        (1,),
        batch_size,
        (temperature, temperature),
        (sft_ratio, sft_ratio),
        "baby_step",
        drop_last,
    )
    per_epoch = _batches(len(order), batch_size, drop_last)
    if steps < 1:
        raise RecipeError(f"a plan of {steps} steps trains nothing: ask for at least 1")
    if per_epoch == 0:
        raise RecipeError(
            f"{len(order)} samples do not fill one batch of train.batch_size={batch_size}: make "
            f"it smaller"
        )
    stage = Stage(
        0, 0, len(order), temperature, sft_ratio, -(-steps // per_epoch), per_epoch, steps, order
    )
    return Plan([stage], batch_size, "baby_step", drop_last)


def _batches(samples: int, batch_size: int, drop_last: bool) -> int:
    return samples // batch_size if drop_last else -(-samples // batch_size)


def _check(
    total: int,
    num_subsets: int,
    epochs: tuple[int, ...],
    batch_size: int,
    temperature: tuple[float, float],
    sft_ratio: tuple[float, float],
    scheduler: str,
    drop_last: bool,
) -> None:
    if num_subsets < 1 or num_subsets > total:
        raise RecipeError(
            f"curriculum.num_subsets={num_subsets} for {total} samples: make it at least 1 and at most one for "
            f"each sample"
        )
    if len(epochs) != num_subsets:
        raise RecipeError(
            f"curriculum.epochs_per_stage={list(epochs)} for curriculum.num_subsets={num_subsets}: give one number "
            f"for each stage"
        )
    if min(epochs) < 1 or batch_size < 1:
        raise RecipeError(
            f"curriculum.epochs_per_stage={min(epochs)} and train.batch_size={batch_size} must be at "
            f"least 1"
        )
    if not all(0 < value < math.inf for value in temperature):
        raise RecipeError(
            f"curriculum.temperature={list(temperature)}: a temperature must be a number greater than 0, as in [1.0, 2.0]"
        )
    if not all(0 <= value <= 1 for value in sft_ratio):
        raise RecipeError(
            f"curriculum.sft_ratio={list(sft_ratio)}: a share must lie between 0 and 1"
        )
    if scheduler not in ("baby_step", "one_pass"):
        raise RecipeError(f"curriculum.scheduler={scheduler!r}: take baby_step or one_pass")
