"""Model FLOPs utilization (MFU): the arithmetic that a step needs, as a fraction of what the GPUs
could do in its time.

Activation checkpointing computes some of it twice; that does not count.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocl_ds.models.peak_flops import peak_flops
from pocl_ds.runtime import distributed
from pocl_ds.training.sample_flops import SampleFlops
from pocl_ds.training.training_run import TrainingRun

log = logging.getLogger("pocl_ds")


@dataclass(frozen=True)
class Utilization:
    """Computes the utilization of a training's optimizer steps."""

    flops: SampleFlops
    peak: float  # FLOP per second of all ranks

    def of_step(
        self,
        lengths: NDArray[np.int64],
        loss_tokens: NDArray[np.int64],
        seconds: float,
        sample_teachers: NDArray[np.int64] | None = None,
    ) -> float:
        """The utilization, between 0 and 1. Arguments: see `SampleFlops.of`."""
        total = float(self.flops.of(lengths, loss_tokens, sample_teachers).sum())
        return total / (seconds * self.peak)


def measure_utilization(training: TrainingRun, flops: SampleFlops | None) -> Utilization | None:
    """The utilization of a training with resolved dtypes on this machine; None, with a line in the
    log, where the peak is not known: on CPUs, on other cards, and in float32. flops: None if they
    are not known, which the log says already.
    """
    if flops is None:
        return None
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
    log.info("%s: MFU is relative to %.0f TFLOP/s of %s", training.label, peak / 1e12, device)
    return Utilization(flops, peak * distributed.world_size())
