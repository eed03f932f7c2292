"""How often the curriculum drew each sample: the sampler is asked again, since a step's batch
follows from plan and seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.curriculum.plan import Plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.workflow.run_dir import RunDirectory


def times_seen(
    run: RunDirectory, plan: dict[str, Any], *, seed: int, window: int, steps: int
) -> NDArray[np.int64]:
    """Draws of each sample in the first `steps` steps, [samples], easiest first. window:
    train.length_window.
    """
    size = int(plan["stages"][-1]["stop"])
    lengths = None
    if (
        window > 1
    ):  # lengths decide which batch of a window a sample is in, and so what a cut epoch has seen
        order = np.load(run.ranking / "order.npy", mmap_mode="r")
        lengths = np.asarray(TokenizedSplit.open(run.data, "train").total_tokens)[order]
    sampler = Sampler(Plan.from_json(plan, range(size)), seed, lengths=lengths, window=window)
    seen = np.zeros(size, np.int64)
    for step in range(min(steps, sampler.plan.total_steps)):
        np.add.at(seen, sampler.batch(step), 1)  # a padded tail may hold a sample twice
    return seen
