"""The arithmetic of single samples in a training: what micro-batches are balanced by, and MFU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import ModelSource
from pocl_ds.config.registry import RECORD_MODES
from pocl_ds.errors import ModelError, PoclError
from pocl_ds.models.cost import ModelShape, model_shape
from pocl_ds.models.estimate import sample_flops
from pocl_ds.models.load import load_model_config
from pocl_ds.models.memory import TrainingSetup
from pocl_ds.training.training_run import TrainingRun

log = logging.getLogger("pocl_ds")

UNITS_OF_A_TOKEN = 1 << 10  # the cost of a token without attention


@dataclass(frozen=True)
class SampleFlops:
    """Computes the FLOPs of samples in student and teachers, forward and backward.

    teachers: shapes of the teachers. Those of an ensemble all read every token; of those by stage
    or by domain each token has one. None of `setup` but the teacher's mode has an effect.
    """

    student: ModelShape
    teachers: Sequence[ModelShape]
    setup: TrainingSetup

    def of(
        self,
        lengths: NDArray[np.int64],
        loss_tokens: NDArray[np.int64],
        sample_teachers: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]:
        """FLOPs of each sample, [samples]. A teacher with its own tokenizer is counted with
        the student's tokens.

        lengths, loss_tokens: of each sample. sample_teachers: number of the teacher of each sample;
        None if every teacher reads all.
        """
        student = sample_flops(self.student, None, self.setup, lengths, loss_tokens)
        total = student
        for number, teacher in enumerate(self.teachers):
            with_teacher = sample_flops(self.student, teacher, self.setup, lengths, loss_tokens)
            reads = True if sample_teachers is None else sample_teachers == number
            total = total + np.where(reads, with_teacher - student, 0.0)
        return total

    def costs(
        self,
        lengths: NDArray[np.int64],
        loss_tokens: NDArray[np.int64],
        sample_teachers: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """The same relative to a token, in integers: all ranks sum them without rounding."""
        token = sample_flops(self.student, None, self.setup, np.ones(1), np.zeros(1))[0]
        units = self.of(lengths, loss_tokens, sample_teachers) / token * UNITS_OF_A_TOKEN
        return np.rint(units).astype(np.int64)


def flops_of_training(training: TrainingRun) -> SampleFlops | None:
    """The FLOPs of a training's samples; None for a student of an unknown family. A teacher whose
    shape is not known does not count. The log says both.
    """
    config = load_model_config(
        training.student_path,
        trust_remote_code=training.student.trust_remote_code,
        revision=training.student.revision,
    )
    try:
        student = model_shape(config, training.student.lora)
    except ModelError:
        log.info(
            "%s: the arithmetic of the %s model is not known: micro-batches are balanced by tokens",
            training.label,
            config.model_type,
        )
        return None
    mode, teachers = _teacher_mode(training), []
    if mode not in ("none", *RECORD_MODES):  # their records hold what the teacher computed
        try:
            teachers = [_teacher_shape(source) for source in _read_teachers(training)]
        except PoclError as error:
            log.info("%s: the teacher's arithmetic does not count: %s", training.label, error)
    return SampleFlops(student, teachers, TrainingSetup(1, teacher_mode=mode))


def _read_teachers(training: TrainingRun) -> list[ModelSource]:
    """The teachers in the order of their numbers; a cached one too."""
    return replace(training, teacher_cache=None).online_teachers


def _teacher_shape(source: ModelSource) -> ModelShape:
    return model_shape(load_model_config(source.model, trust_remote_code=source.trust_remote_code))


def _teacher_mode(training: TrainingRun) -> str:
    """The mode in the words of `TrainingSetup`."""
    if training.teacher is None:
        return "none"
    if training.teacher_cache is None:
        # The student's ranks apply only the head of a teacher on its own ranks.
        is_remote = training.teacher.placement == "own_ranks"
        return "cached_hidden_states" if is_remote else "online"
    mode = training.teacher.mode
    return mode if mode in RECORD_MODES else "cached_hidden_states"
