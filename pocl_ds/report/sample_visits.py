"""How often the curriculum drew each sample, computed by the sampler from plan and seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.curriculum.plan import Plan
from pocl_ds.curriculum.plan_step import PLAN_REMEDY, load_order
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.curriculum.stage_files import load_stage, load_weights
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.workflow.run_dir import RunDirectory


def count_sample_visits(
    run: RunDirectory,
    plan: dict[str, Any],
    *,
    seed: int,
    window: int,
    steps: int,
    ranked_stages: Sequence[int] = (),
) -> NDArray[np.int64]:
    """Visits of each sample in the first `steps` optimizer steps: [samples], easiest first in the
    ranking before training. A sample that the weights leave out has none.

    window: the recipe's train.length_window. ranked_stages: those that the student ranked, from 0.
    """
    order = load_order(run)
    # With a window, lengths decide which batch a sample is in, which matters for the last epoch.
    lengths = None
    if window > 1:
        lengths = np.asarray(TokenizedSplit.open(run.data, "train").total_tokens)
    weights = load_weights(run.plan, PLAN_REMEDY)
    sampler = Sampler(Plan.from_json(plan, order, weights), seed, lengths=lengths, window=window)
    # Stages that the student ranked have their own order.
    for stage in ranked_stages:
        sampler.replace_stage(load_stage(sampler.plan, run.train, stage))
    visits = np.zeros(len(order), np.int64)
    for step in range(min(steps, sampler.plan.total_steps)):
        np.add.at(visits, sampler.batch(step), 1)  # a padded batch may hold a sample twice
    return visits[order]
