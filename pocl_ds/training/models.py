"""Student and teacher of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.batches import Batch
from pocl_ds.engines.protocol import Engine
from pocl_ds.teachers.remote import RemoteTeacher
from pocl_ds.teachers.routed import DomainTeachers, StageTeachers
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


AnyTeacher: TypeAlias = Teacher | NoTeacher | StageTeachers | DomainTeachers


@dataclass(frozen=True)
class TrainingModels:
    """The student in its engine, and the teacher, or those of stages or domains."""

    engine: Engine
    teacher: AnyTeacher

    def teacher_of(self, batch: Batch) -> Teacher | NoTeacher:
        """The teacher of a micro-batch."""
        if isinstance(self.teacher, (StageTeachers, DomainTeachers)):
            return self.teacher.of_batch(batch)
        return self.teacher

    def remote_teacher_of(self, batch: Batch) -> RemoteTeacher:
        """The teacher of a micro-batch, where teachers have their own ranks."""
        teacher = self.teacher_of(batch)
        assert isinstance(teacher, RemoteTeacher)
        return teacher

    def wait_for_teachers(self) -> None:
        """Wait until the teachers that have their own ranks are loaded. All ranks call it
        together.
        """
        teachers: Sequence[Any] = [self.teacher]
        if isinstance(self.teacher, DomainTeachers):
            teachers = list(self.teacher.teachers.values())
        for teacher in teachers:
            if isinstance(teacher, RemoteTeacher):
                teacher.wait_until_loaded()

    def start_stage(self, stage: int) -> None:
        """Load the teacher of a stage, counted from 0, if stages have their own. All ranks call it
        together.
        """
        if isinstance(self.teacher, StageTeachers):
            self.teacher.start_stage(stage)

    def teacher_numbers(
        self, stage: int, sample_teachers: NDArray[np.int64] | None, rows: NDArray[np.int64]
    ) -> NDArray[np.int64] | None:
        """The number of the teacher of each of these samples; None if they have all teachers.

        stage: counted from 0. sample_teachers: the result by domain.
        """
        if isinstance(self.teacher, StageTeachers):
            return np.full(len(rows), self.teacher.number_of(stage), np.int64)
        return sample_teachers

    def metrics_of_teachers(
        self, stage: int, sample_teachers: NDArray[np.int64] | None
    ) -> dict[str, Any]:
        """What the record of a step or validation says of the teachers: by stage `teacher`, by
        domain `teacher_samples`, the number of samples that each one had; else nothing.

        sample_teachers: number of each sample's teacher, by domain.
        """
        if isinstance(self.teacher, StageTeachers):
            return {"teacher": self.teacher.models[self.teacher.number_of(stage)].label}
        if not isinstance(self.teacher, DomainTeachers) or sample_teachers is None:
            return {}
        models = self.teacher.models
        counts = np.bincount(sample_teachers, minlength=len(models)).tolist()
        return {"teacher_samples": {m.label: n for m, n in zip(models, counts, strict=True) if n}}

    @property
    def has_teacher(self) -> bool:
        """Whether the loss has a divergence."""
        return not isinstance(self.teacher, NoTeacher)
