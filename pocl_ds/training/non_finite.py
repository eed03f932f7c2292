"""Losses and gradients that are not finite: such a step does not change the weights, its batch is
written to a file, and the run stops or continues.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.curriculum.sampler import SamplerPosition
from pocl_ds.errors import NumericalError
from pocl_ds.runtime import distributed
from pocl_ds.workflow.files import write_json

log = logging.getLogger("pocl_ds")

MAX_SHOWN_SAMPLES = 4  # in a message; the file has all of them


class NonFiniteSteps:
    """Counts skipped steps. All ranks call it together, with the same numbers."""

    def __init__(self, directory: Path, *, allowed: int) -> None:
        """directory: of the training, for files; allowed: steps that may be skipped."""
        self.directory, self.allowed = directory, allowed
        self.skipped = 0  # since the start of the training, over all its processes

    def check(
        self,
        loss: float,
        grad_norm: float,
        position: SamplerPosition,
        micro_batches: list[tuple[NDArray[np.bytes_], Tensor]],
    ) -> dict[str, Any] | None:
        """None if loss and gradient norm are finite, else the record of a skipped step.

        micro_batches: sample ids and loss sum of each micro-batch of this rank. Raises
        NumericalError if the recipe allows no further skipped step, or if the gradient is finite,
        because the engine has then already applied it.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return None
        # Write the batch to a file, which the message names.
        quantity, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
        step = position.step + 1
        record = {
            "kind": "skipped",
            "step": step,
            "stage": position.stage,
            "quantity": quantity,
            "value": str(value),
        }
        samples = self._write_batch(record, micro_batches)
        # The engine has not applied a gradient that is not finite.
        if self.skipped < self.allowed and not math.isfinite(grad_norm):
            self.skipped += 1
            log.warning(
                "the %s is %s at step %d (%s): the step is skipped, number %d of at most %d",
                quantity,
                value,
                step,
                samples,
                self.skipped,
                self.allowed,
            )
            return record
        raise NumericalError(
            f"the {quantity} is {value} at step {step} ({samples}): lower train.lr, use dtype "
            f"float32, or allow a few skipped steps (train.max_non_finite_steps). The last "
            f"checkpoint is intact, and the same command resumes from it"
        )

    def _write_batch(
        self, record: dict[str, Any], micro_batches: list[tuple[NDArray[np.bytes_], Tensor]]
    ) -> str:
        """Write the micro-batches of all ranks to a file. Returns the samples of those whose loss
        is not finite (or of all), and the file, for a message.
        """
        rank_batches = [
            ([name.decode() for name in ids], float(total)) for ids, total in micro_batches
        ]
        batches = [
            {"rank": rank, "loss_sum": str(total), "ids": ids}
            for rank, gathered in enumerate(distributed.gather_objects(rank_batches))
            for ids, total in gathered
        ]
        path = self.directory / f"non_finite-step-{record['step']:08d}.json"
        if distributed.rank() == 0:
            write_json(path, {**record, "micro_batches": batches})
        suspects = [batch for batch in batches if not math.isfinite(float(batch["loss_sum"]))]
        names = [name for batch in suspects or batches for name in batch["ids"]]
        first_names = ", ".join(names[:MAX_SHOWN_SAMPLES])
        more = ", ..." if len(names) > MAX_SHOWN_SAMPLES else ""
        return f"samples {first_names}{more}; all micro-batches in {path}"
