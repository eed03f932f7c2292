"""Teachers by stage of the curriculum or by domain of the sample: each sample has one of several
online teachers, and the loss stays the mean over the step's loss tokens (docs/method.md, eq. 10).

By stage, only the teacher of the current stage is in memory. By domain, all teachers are, and a
micro-batch has the samples of one of them.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.data.batches import Batch
from pocl_ds.runtime import distributed
from pocl_ds.teachers.teacher import OnlineTeacher

log = logging.getLogger("pocl_ds")


@dataclass(frozen=True)
class RoutedModel:
    """One of several teachers. label: its name in the recipe, for metrics."""

    label: str
    path: str


class StageTeachers:
    """The teachers of the stages of a curriculum, of which one is in memory.

    models: the different teachers. model_of_stage: place among them, for each stage. load: loads
    the model in a folder. All ranks call every method together.
    """

    def __init__(
        self,
        models: Sequence[RoutedModel],
        model_of_stage: Sequence[int],
        load: Callable[[str], OnlineTeacher],
    ) -> None:
        self.models, self.model_of_stage, self._load = tuple(models), tuple(model_of_stage), load
        # Called with each teacher that was loaded, and its path.
        self.on_load: list[Callable[[OnlineTeacher, str], None]] = []
        self._teacher: OnlineTeacher | None = None
        self._number = -1  # of the teacher in memory

    def number_of(self, stage: int) -> int:
        """Place among `models` of the teacher of a stage, counted from 0."""
        return self.model_of_stage[stage]

    def start_stage(self, stage: int) -> None:
        """Load the teacher of a stage, counted from 0, and free the one before. Does nothing if it
        is in memory.
        """
        number = self.number_of(stage)
        if number == self._number:
            return
        if self._teacher is not None:
            start = time.monotonic()
            self._free()
            former = self.models[self._number].path
            log.info("freed the teacher %s: seconds=%.1f", former, time.monotonic() - start)
        start = time.monotonic()
        path = self.models[number].path
        self._teacher, self._number = self._load(path), number
        seconds = time.monotonic() - start
        log.info("stage %d has the teacher %s: seconds=%.1f", stage + 1, path, seconds)
        for callback in self.on_load:
            callback(self._teacher, path)

    def of_batch(self, batch: Batch) -> OnlineTeacher:
        """The teacher of a micro-batch: that of the current stage."""
        assert self._teacher is not None, "no stage was started"
        return self._teacher

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> None:
        """See `Teacher`. A model can read any row."""

    def _free(self) -> None:
        """Release the teacher in memory. Its module is part of reference cycles."""
        assert self._teacher is not None
        self._teacher.engine.close()
        self._teacher = None
        gc.collect()
        if distributed.device().type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class DomainTeachers:
    """The teachers of the domains of the samples, all in memory.

    models: the different teachers. teachers: the same, loaded.
    """

    models: tuple[RoutedModel, ...]
    teachers: tuple[OnlineTeacher, ...] = field(repr=False)

    def of_batch(self, batch: Batch) -> OnlineTeacher:
        """The teacher of a micro-batch."""
        return self.teachers[batch.teacher_number]

    def find_damage(self, split: str, rows: NDArray[np.int64]) -> None:
        """See `Teacher`. Models can read any row."""
