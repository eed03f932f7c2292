"""Files of orders and weights: those of the plan, and those of a stage that the student ranked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.curriculum.plan import Plan, Stage
from pocl_ds.errors import ArtifactError

ORDER, WEIGHTS, SCORES = "order.npy", "weights.npy", "scores.parquet"


def stage_directory(training: Path, stage: int) -> Path:
    """Where the ranking of a stage, counted from 0, is; training: the training's directory."""
    return training / "stages" / f"stage-{stage + 1:02d}"


def load_stage(plan: Plan, training: Path, stage: int) -> Stage:
    """The stage of a plan with the order and weights that its student gave the samples."""
    directory = stage_directory(training, stage)
    remedy = f"restore it, or remove {directory} and the checkpoints of stage {stage + 1}"
    order = load_array(directory / ORDER, remedy)
    return plan.with_order(stage, order, load_weights(directory, remedy))


def load_weights(directory: Path, remedy: str) -> NDArray[np.float32] | None:
    """The weight of each dataset row, [rows]; None if all weigh alike. Raises ArtifactError if the
    file is damaged.
    """
    path = directory / WEIGHTS
    return load_array(path, remedy) if path.is_file() else None


def load_array(path: Path, remedy: str) -> NDArray[Any]:
    """An array, memory-mapped. Raises ArtifactError with the remedy if the file is damaged."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): {remedy}") from None
    return array
