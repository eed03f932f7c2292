"""The one collective of an optimizer step, and its late reading.

Every rank contributes a short vector: its loss sums, whether it should stop or is still writing a
checkpoint, whether the teacher's outputs of a later step are damaged, and a hash of what that step
trains on. The device copies the vectors of all ranks to the host; the host reads them one step
later, so that the device always has work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocl_ds.runtime import distributed


@dataclass(frozen=True)
class StepOutcome:
    """What all ranks know after a step. The losses are sums over the loss tokens of all ranks."""

    total_sum: float
    kd_sum: float
    sft_sum: float
    grad_norm: float
    stopping: bool  # a signal reached some rank
    is_writing: bool  # some rank still writes a checkpoint
    is_damaged: bool  # the teacher's outputs of a later step, on some rank
    ranks_agree: bool  # on what that step trains on


class StepExchange:
    """Starts the collective when it is created; all ranks create it together."""

    def __init__(
        self,
        loss_sums: Tensor,
        grad_norm: float | Tensor,
        *,
        stopping: bool,
        is_writing: bool,
        is_damaged: bool,
        facts: Mapping[str, Any],
    ) -> None:
        """loss_sums: [3] float64 on the device: total, divergence, cross-entropy. facts: of the
        later step.
        """
        device = loss_sums.device
        pin = device.type == "cuda"
        flags = [stopping, is_writing, is_damaged, distributed.digest_number(facts)]
        on_host = torch.tensor(flags, dtype=torch.float64, pin_memory=pin)
        norm = torch.as_tensor(grad_norm, dtype=torch.float64).reshape(1)
        own = torch.cat([t.to(device, non_blocking=True) for t in (loss_sums, norm, on_host)])
        gathered = distributed.gather_vectors(own)
        self._values = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=pin)
        self._values.copy_(gathered, non_blocking=True)

    def read(self) -> StepOutcome:
        """The outcome, after the device has reached this point."""
        ranks, sums = self._values.tolist(), self._values.sum(0).tolist()
        stopping, is_writing, is_damaged = (bool(flag) for flag in sums[4:7])
        return StepOutcome(
            total_sum=sums[0],
            kd_sum=sums[1],
            sft_sum=sums[2],
            grad_norm=ranks[0][3],  # the same on all ranks
            stopping=stopping,
            is_writing=is_writing,
            is_damaged=is_damaged,
            ranks_agree=len({values[7] for values in ranks}) == 1,
        )
