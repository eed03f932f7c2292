"""Padding or packing: how the samples of a micro-batch lie in tensors, chosen before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.config import TrainConfig
from pocl_ds.curriculum.micro_batches import deal
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.errors import RecipeError
from pocl_ds.models.heads import packs
from pocl_ds.runtime import distributed

log = logging.getLogger("pocl_ds")

STEPS = 16  # of each stage, whose lengths are looked at


@dataclass(frozen=True)
class Layout:
    """packed: samples behind one another in one row. padding_share: of a padded micro-batch's
    tokens, what padding would be.
    """

    packed: bool
    padding_share: float


def choose_layout(
    train: TrainConfig, sampler: Sampler, lengths: NDArray[np.int64], models: Sequence[Any]
) -> Layout:
    """How micro-batches lie: as the recipe says, else packed wherever the models' attention allows
    it.

    With attention at each sample alone packing never costs more than padding. lengths: tokens of
    each sample, easiest first. Raises RecipeError where packing is asked of a model that cannot
    keep packed samples apart.
    """
    unable = next((model.config for model in models if not packs(model)), None)
    if unable is not None and train.layout == "packed":
        raise RecipeError(
            f"train.layout=packed: {unable.model_type} with "
            f"attention={unable._attn_implementation} does not keep packed "
            "samples apart: choose attention per_sample, or layout padded"
        )
    packed = train.layout != "padded" and unable is None
    why = "the recipe says so" if train.layout != "auto" else "attention looks at each sample alone"
    if train.layout == "auto" and unable is not None:
        why = f"{unable.model_type} with attention={unable._attn_implementation} cannot be packed"
    layout = Layout(packed, padding_share(train, sampler, lengths))
    log.info(
        "micro-batches are %s: %s; padding %s %.0f%% of their tokens",
        "packed" if packed else "padded",
        why,
        "would be" if packed else "is",
        100 * layout.padding_share,
    )
    return layout


def padding_share(train: TrainConfig, sampler: Sampler, lengths: NDArray[np.int64]) -> float:
    """Share of padding in padded micro-batches, over the first steps of each stage."""
    batches = _padded_micro_batches(train, _first_batches(sampler, lengths))
    return 1 - sum(int(batch.sum()) for batch in batches) / sum(
        len(batch) * int(batch.max()) for batch in batches
    )


def _first_batches(sampler: Sampler, lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Lengths in the first global batches of each stage."""
    found, start = [], 0
    for stage in sampler.plan.stages:
        steps = range(start, start + min(STEPS, stage.steps))
        found += [np.asarray(lengths[sampler.batch(step)], np.int64) for step in steps]
        start += stage.steps
    return found


def _padded_micro_batches(
    train: TrainConfig, batches: list[NDArray[np.int64]]
) -> list[NDArray[np.int64]]:
    """Lengths in the padded micro-batches that all ranks make of some global batches."""
    found = []
    for batch in batches:
        dealt = deal(
            batch,
            ranks=distributed.world_size(),
            micro_batch_size=train.micro_batch_size,
            micro_batch_tokens=train.micro_batch_tokens,
            packed=False,
        )
        found += [batch[members] for rank in dealt for members in rank if len(members)]
    return found
