"""The check before training that student and teachers do not depend on the batch
(`models.batch_invariance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.batches import Batch
from pocl_ds.models.batch_invariance import check_batch_invariance, choose_samples
from pocl_ds.rollouts.student_log_probs import student_log_probs
from pocl_ds.runtime import distributed
from pocl_ds.teachers.invariance import CheckedTeacher, check_teacher, teacher_dtype
from pocl_ds.teachers.remote import RemoteTeacher
from pocl_ds.teachers.routed import DomainTeachers, StageTeachers
from pocl_ds.teachers.teacher import CachedTeacher, TeacherEnsemble
from pocl_ds.training.data import TrainingData
from pocl_ds.training.models import NoTeacher, TrainingModels
from pocl_ds.training.training_run import TrainingRun


def check_models(
    training: TrainingRun, models: TrainingModels, data: TrainingData
) -> dict[str, Any]:
    """Check the log-probabilities of a few training samples under student and online teachers,
    alone and in a micro-batch. All ranks call it together.

    Teachers of stages are checked when they are loaded, and added to the result then.

    Returns what the manifest records. Raises ModelError on all ranks if they differ.
    """
    training, rows = training.with_resolved_dtypes(), _choose_rows(training, data)
    info = {"student": _check_student(training, models, data, rows)}
    teacher = models.teacher

    def batch_of(batch_rows: Sequence[int]) -> Batch:
        return data.batch(data.train, np.array(batch_rows, np.int64))

    def check(member: CheckedTeacher | RemoteTeacher, path: str) -> None:
        assert training.teacher is not None
        if isinstance(member, RemoteTeacher):
            (member,) = member.members
        label, dtype = f"{training.label}: the teacher {path}", teacher_dtype(training.teacher)
        info[path] = check_teacher(label, member, data.train, rows, batch_of, dtype=dtype)

    if isinstance(teacher, StageTeachers):
        teacher.on_load.append(check)
    members: Sequence[tuple[Any, str]] = [(teacher, path) for path in training.teacher_paths[:1]]
    if isinstance(teacher, TeacherEnsemble):
        members = list(zip(teacher.teachers, training.teacher_paths, strict=True))
    elif isinstance(teacher, RemoteTeacher):
        members = list(zip(teacher.members, training.teacher_paths, strict=True))
    elif isinstance(teacher, DomainTeachers):
        members = [(own, teacher.models[place].path) for place, own in teacher.teachers.items()]
    for member, path in members:
        if not isinstance(member, (CachedTeacher, StageTeachers, NoTeacher)):
            check(member, path)
    return info


def _choose_rows(training: TrainingRun, data: TrainingData) -> list[int]:
    """Rows of samples that fit into one micro-batch; none if a micro-batch is one sample."""
    lengths = np.asarray(data.train.total_tokens, np.int64)
    return choose_samples(
        lengths,
        seed=training.seed,
        max_tokens=data.micro_batch_tokens or data.micro_batch_size * int(lengths.max(initial=1)),
        packed=data.layout.packed,
        max_samples=None if data.micro_batch_tokens else data.micro_batch_size,
    )


def _check_student(
    training: TrainingRun, models: TrainingModels, data: TrainingData, rows: Sequence[int]
) -> dict[str, Any]:
    split, packed = data.train, data.layout.packed

    def log_probs(places: Sequence[int]) -> list[NDArray[np.float64]]:
        chosen = [rows[place] for place in places]
        return student_log_probs(models.engine, split, chosen, packed=packed)

    with distributed.raise_on_all_ranks("check the student's log-probabilities"):
        return check_batch_invariance(
            f"{training.label}: the student",
            [split.ids[row].decode() for row in rows],
            [int(split.total_tokens[row] - split.prompt_tokens[row]) for row in rows],
            log_probs,
            dtype=training.student.dtype,
            on_gpu=distributed.device().type == "cuda",
            remedy="set student.attn_implementation=eager, or train.micro_batch_size=1 without "
            "train.micro_batch_tokens",
        )
