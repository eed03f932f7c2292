"""Losses and gradients that are not finite: no such step is applied; its batch is written down, the
run stops or goes on.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.curriculum.sampler import Position
from pocl_ds.errors import NumericalError
from pocl_ds.runtime import distributed
from pocl_ds.workflow.run_dir import write_json

log = logging.getLogger("pocl_ds")

SHOWN = 4  # sample ids in a sentence; the file has them all


class NonFinite:
    """Counts the steps that were left out. All ranks call it together, with the same numbers."""

    def __init__(self, directory: Path, *, allowed: int) -> None:
        self.directory, self.allowed = directory, allowed
        self.skipped = 0  # since the training's very beginning

    def check(
        self,
        loss: float,
        norm: float,
        position: Position,
        pieces: list[tuple[NDArray[np.bytes_], Tensor]],
    ) -> dict[str, Any] | None:
        """None where both are finite. Else the record of a step that was left out, or
        NumericalError where no more may be.

        pieces: this rank's micro-batches, the ids of each and its loss sum. The engine applies no
        gradient that is not finite.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return None
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        step = position.step + 1
        record = {
            "kind": "skipped",
            "step": step,
            "stage": position.stage,
            "what": what,
            "value": str(value),
        }
        path = self.directory / f"non_finite-step-{step:08d}.json"
        everyone = distributed.gather_objects(
            [([name.decode() for name in ids], float(total)) for ids, total in pieces]
        )
        batches = [
            {"rank": rank, "loss_sum": str(total), "ids": ids}
            for rank, found in enumerate(everyone)
            for ids, total in found
        ]
        if distributed.rank() == 0:
            write_json(path, {**record, "micro_batches": batches})
        culprits = [
            name
            for batch in batches
            if not math.isfinite(float(batch["loss_sum"]))
            for name in batch["ids"]
        ]
        named = culprits or [name for batch in batches for name in batch["ids"]]
        among = f"samples {', '.join(named[:SHOWN])}{', ...' if len(named) > SHOWN else ''}; all micro-batches in {path}"
        if self.skipped < self.allowed and not math.isfinite(norm):
            self.skipped += 1
            log.warning(
                "the %s is %s at step %d (%s): the step is left out, %d of %d that may be",
                what,
                value,
                step,
                among,
                self.skipped,
                self.allowed,
            )
            return record
        raise NumericalError(
            f"the {what} is {value} at step {step} ({among}): lower train.lr, use dtype float32, "
            f"or let a few such steps be left "
            "out (train.max_non_finite_steps); the last checkpoint is whole, and the same command goes "
            "on from it"
        )
