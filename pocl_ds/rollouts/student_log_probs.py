"""Log-probabilities of responses under the student in its training engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.data.batches import collate
from pocl_ds.data.generated import TokenizedDataset
from pocl_ds.engines.protocol import Engine
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.runtime import distributed


@torch.no_grad()
def student_log_probs(
    engine: Engine, dataset: TokenizedDataset, rows: Sequence[int], *, packed: bool = False
) -> list[NDArray[np.float64]]:
    """The summed log-probability of the last response of each row, in nats: one array [1] per row.

    The rows run as one batch, and the softmax covers every id. The engine gives sums over a batch,
    so there is a forward pass per row. All ranks call it together.
    """
    module: Any = engine.module
    batch = collate(dataset, rows, packed=packed, last_responses=True).to(distributed.device())
    sums = []
    module.eval()
    with module.loss_head.over_all_ids():
        for sample in range(len(rows)):
            _, _, cross_entropy = engine.forward(batch.of_sample(sample), LossTerms("sft"))
            sums.append(np.array([-float(cross_entropy)]))
    module.train()
    return sums
