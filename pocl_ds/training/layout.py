"""Padding or packing of micro-batches, chosen before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.compat.transformers_private import attn_implementation
from pocl_ds.config import TrainConfig
from pocl_ds.curriculum.micro_batches import assign_micro_batches
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.errors import RecipeError
from pocl_ds.models.heads import supports_packing
from pocl_ds.runtime import sequence_parallel

log = logging.getLogger("pocl_ds")

SAMPLED_STEPS = 16  # optimizer steps of each stage whose lengths are measured


@dataclass(frozen=True)
class Layout:
    """packed: the samples of a micro-batch are packed into one row. padding_share: the share of
    padding in a padded micro-batch's tokens.
    """

    packed: bool
    padding_share: float


def choose_layout(
    train: TrainConfig, sampler: Sampler, lengths: NDArray[np.int64], models: Sequence[Any]
) -> Layout:
    """The layout that the recipe names, or with `auto`: packed if the models' attention allows it.

    If attention covers one sample at a time, packing never costs more than padding.
    lengths: tokens of each row, [rows]. Raises RecipeError if the recipe asks for packing and a
    model cannot keep packed samples apart.
    """
    unsupported = next((model.config for model in models if not supports_packing(model)), None)
    attention = attn_implementation(unsupported) if unsupported is not None else None
    if unsupported is not None and train.layout == "packed":
        raise RecipeError(
            f"train.layout=packed: {unsupported.model_type} with attn_implementation={attention} "
            f"does not keep packed samples apart; choose attn_implementation=per_sample, or "
            f"train.layout=padded"
        )
    packed = train.layout != "padded" and unsupported is None
    if train.layout != "auto":
        reason = f"train.layout={train.layout}"
    elif unsupported is None:
        reason = "attention covers one sample at a time"
    else:
        reason = f"{unsupported.model_type} with attn_implementation={attention} cannot be packed"
    layout = Layout(packed, padding_share(train, sampler, lengths))
    log.info(
        "micro-batches are %s (%s); padding %s %.0f%% of their tokens",
        "packed" if packed else "padded",
        reason,
        "would be" if packed else "is",
        100 * layout.padding_share,
    )
    return layout


def padding_share(train: TrainConfig, sampler: Sampler, lengths: NDArray[np.int64]) -> float:
    """The share of padding in padded micro-batches, over the first steps of each stage."""
    batches = _padded_micro_batches(train, _first_batches(sampler, lengths))
    tokens = sum(int(batch.sum()) for batch in batches)
    return 1 - tokens / sum(len(batch) * int(batch.max()) for batch in batches)


def _first_batches(sampler: Sampler, lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Lengths in the first global batches of each stage."""
    batches, start = [], 0
    for stage in sampler.plan.stages:
        steps = range(start, start + min(SAMPLED_STEPS, stage.steps))
        batches += [np.asarray(lengths[sampler.batch(step)], np.int64) for step in steps]
        start += stage.steps
    return batches


def _padded_micro_batches(
    train: TrainConfig, batches: list[NDArray[np.int64]]
) -> list[NDArray[np.int64]]:
    """Lengths in the padded micro-batches of all ranks, from those of global batches."""
    micro_batches = []
    for batch in batches:
        assignment = assign_micro_batches(
            batch,
            ranks=sequence_parallel.data_parallel_size(),
            micro_batch_size=train.micro_batch_size,
            micro_batch_tokens=train.micro_batch_tokens,
            packed=False,
        )
        micro_batches += [batch[members] for rank in assignment for members in rank if len(members)]
    return micro_batches
