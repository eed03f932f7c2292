"""Learning and forgetting in a study: the validation loss of each domain of the samples during the
trainings of each arm.

Curricula are said to help because a student that has learned easy samples does not forget them when
hard ones enter (docs/method.md). Forgetting is how far the loss of a domain rises again
after its lowest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from pocl_ds.metrics.bootstrap import Floats
from pocl_ds.runtime.formatting import align_columns
from pocl_ds.runtime.metrics import read_metrics
from pocl_ds.study.cells import Cell
from pocl_ds.study.run import cell_directory

BY_DOMAIN = "validation_loss_by_domain"


@dataclass(frozen=True)
class LearningCurves:
    """The validations of the trainings of one group of cells.

    Args:
        group: arm and labels.
        steps: optimizer steps of the validations, [v].
        losses: domain -> nats per token, [trainings, v].
    """

    group: str
    steps: list[int]
    losses: dict[str, Floats]

    def forgetting(self, domain: str) -> Floats:
        """The last loss of a domain minus its lowest, [trainings]."""
        losses = self.losses[domain]
        return np.asarray(losses[:, -1] - losses.min(1))


def read_learning_curves(folder: Path, finished: Sequence[Cell]) -> list[LearningCurves]:
    """The curves of each group of finished cells; none if the samples have no domains."""
    curves = []
    for group in dict.fromkeys(cell.group for cell in finished):
        trainings = [_validations(folder, cell) for cell in finished if cell.group == group]
        if all(trainings):
            domains = sorted(trainings[0][0][BY_DOMAIN])
            curves.append(
                LearningCurves(
                    group,
                    [record["step"] for record in trainings[0]],
                    {
                        domain: np.array([[r[BY_DOMAIN][domain] for r in run] for run in trainings])
                        for domain in domains
                    },
                )
            )
    return curves


def forgetting_lines(folder: Path, finished: Sequence[Cell]) -> list[str]:
    """A table of how much each group has forgotten of each domain; empty without domains."""
    curves = read_learning_curves(folder, finished)
    if not curves:
        return []
    domains = list(curves[0].losses)
    rows = [["validation loss", *domains, *(f"forgot {domain}" for domain in domains)]]
    for group in curves:
        ends = [_mean_and_deviation(group.losses[domain][:, -1]) for domain in domains]
        forgotten = [_mean_and_deviation(group.forgetting(domain)) for domain in domains]
        rows.append([group.group, *ends, *forgotten])
    return [
        *align_columns(rows, numbers=True),
        "validation loss in nats per token at the end; forgot: how far it is above its lowest "
        "value of the training",
    ]


def _validations(folder: Path, cell: Cell) -> list[dict[str, Any]]:
    path = cell_directory(folder, cell).train / "metrics.jsonl"
    records = read_metrics(path, "validation") if path.is_file() else []
    return [record for record in records if BY_DOMAIN in record]


def _mean_and_deviation(values: Floats) -> str:
    numbers = values.tolist()
    return f"{fmean(numbers):.3f}" + (f" ± {stdev(numbers):.3f}" if len(numbers) > 1 else "")
