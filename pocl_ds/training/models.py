"""Student and teacher of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.batches import Batch
from pocl_ds.engines.protocol import Engine
from pocl_ds.teachers.teacher import Teacher


class NoTeacher:
    """Takes the place of the teacher if the loss has no divergence (SFT)."""

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> None:
        """See `Teacher`. There is nothing to check."""

    def outputs(self, batch: Batch) -> None:
        """See `Teacher`. There are none."""

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """See `Teacher`. There is none."""
        yield None


@dataclass(frozen=True)
class TrainingModels:
    """The student in its engine, and the teacher."""

    engine: Engine
    teacher: Teacher | NoTeacher

    @property
    def has_teacher(self) -> bool:
        """Whether the loss has a divergence."""
        return not isinstance(self.teacher, NoTeacher)
