"""How often the curriculum drew each sample, computed by the sampler from plan and seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.curriculum.plan import Plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.workflow.run_dir import RunDirectory


def count_sample_visits(
    run: RunDirectory, plan: dict[str, Any], *, seed: int, window: int, steps: int
) -> NDArray[np.int64]:
    """Visits of each sample in the first `steps` optimizer steps: [samples], easiest first.

    window: the recipe's train.length_window.
    """
    size = int(plan["stages"][-1]["stop"])
    # With a window, lengths decide which batch a sample is in, which matters for the last epoch.
    lengths = None
    if window > 1:
        order = np.load(run.ranking / "order.npy", mmap_mode="r")
        lengths = np.asarray(TokenizedSplit.open(run.data, "train").total_tokens)[order]
    sampler = Sampler(Plan.from_json(plan, range(size)), seed, lengths=lengths, window=window)
    visits = np.zeros(size, np.int64)
    for step in range(min(steps, sampler.plan.total_steps)):
        np.add.at(visits, sampler.batch(step), 1)  # a padded batch may hold a sample twice
    return visits
