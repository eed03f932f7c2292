"""Model FLOPs utilization (MFU): the arithmetic that a step needs, as a fraction of what the GPUs
could do in its time.

Activation checkpointing computes some of it twice; that does not count.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import ModelSource
from pocl_ds.config.registry import RECORD_MODES
from pocl_ds.errors import PoclError
from pocl_ds.models.cost import ModelShape, model_shape
from pocl_ds.models.estimate import step_flops
from pocl_ds.models.load import load_model_config
from pocl_ds.models.memory import TrainingSetup
from pocl_ds.models.peak_flops import peak_flops
from pocl_ds.runtime import distributed
from pocl_ds.training.training_run import TrainingRun

log = logging.getLogger("pocl_ds")


@dataclass(frozen=True)
class Utilization:
    """Computes the utilization of a training's optimizer steps.

    teachers: shapes of the teachers. Those of an ensemble all read every token; of those by stage
    or by domain each token has one.
    """

    student: ModelShape
    teachers: Sequence[ModelShape]
    setup: TrainingSetup
    peak: float  # FLOP per second of all ranks

    def flops(
        self,
        lengths: NDArray[np.int64],
        loss_tokens: NDArray[np.int64],
        sample_teachers: NDArray[np.int64] | None = None,
    ) -> float:
        """FLOPs of a step. A teacher with a tokenizer of its own is counted with the student's
        tokens.

        lengths, loss_tokens: of each sample. sample_teachers: number of the teacher of each sample;
        None if every teacher reads all.
        """
        student = self._flops(None, lengths, loss_tokens)
        total = student
        for number, teacher in enumerate(self.teachers):
            own = slice(None) if sample_teachers is None else sample_teachers == number
            part = lengths[own], loss_tokens[own]
            total += self._flops(teacher, *part) - self._flops(None, *part)
        return total

    def _flops(
        self, teacher: ModelShape | None, lengths: NDArray[np.int64], loss_tokens: NDArray[np.int64]
    ) -> float:
        tokens = int(loss_tokens.sum())
        return step_flops(self.student, teacher, self.setup, lengths.tolist(), tokens)

    def of_step(
        self,
        lengths: NDArray[np.int64],
        loss_tokens: NDArray[np.int64],
        seconds: float,
        sample_teachers: NDArray[np.int64] | None = None,
    ) -> float:
        """The utilization, between 0 and 1. Arguments: see `flops`."""
        return self.flops(lengths, loss_tokens, sample_teachers) / (seconds * self.peak)


def measure_utilization(training: TrainingRun) -> Utilization | None:
    """The utilization of a training with resolved dtypes on this machine; None, with a line in the
    log, where the peak is not known: on CPUs, on other cards, and in float32.
    """
    device, dtype = distributed.device_name(), training.student.dtype
    peak = peak_flops(device)
    if peak is None or dtype == "float32":
        log.info(
            "%s: no MFU in the metrics: the peak of %s in %s is not known",
            training.label,
            device,
            dtype,
        )
        return None
    try:
        student = model_shape(
            load_model_config(
                training.student_path,
                trust_remote_code=training.student.trust_remote_code,
                revision=training.student.revision,
            ),
            training.student.lora,
        )
        teachers = [_teacher_shape(source) for source in _read_teachers(training)]
    except PoclError as error:
        log.info("%s: no MFU in the metrics: %s", training.label, error)
        return None
    setup = TrainingSetup(1, teacher_mode=_teacher_mode(training))
    log.info("%s: MFU is relative to %.0f TFLOP/s of %s", training.label, peak / 1e12, device)
    return Utilization(student, teachers, setup, peak * distributed.world_size())


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
        return "online"
    mode = training.teacher.mode
    return mode if mode in RECORD_MODES else "cached_hidden_states"
