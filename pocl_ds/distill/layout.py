"""Padding or packing: how the samples of a micro-batch lie in tensors, chosen before training by what it costs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds import distributed
from pocl_ds.config import TrainConfig
from pocl_ds.curriculum.dealing import deal
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.data.batches import layout_cost
from pocl_ds.errors import RecipeError
from pocl_ds.models.heads import packs

log = logging.getLogger("pocl_ds")

STEPS = 16  # of each stage, whose lengths decide


def choose_layout(train: TrainConfig, sampler: Sampler, lengths: NDArray[np.int64], models: Sequence[Any]) -> bool:
    """Whether micro-batches are packed: as the recipe says, or what costs less over some steps of the plan.

    lengths: tokens of each sample, easiest first. Raises RecipeError where packing is asked of a model that cannot keep
    packed samples apart.
    """
    unable = next((model.config for model in models if not packs(model)), None)
    if unable is not None and train.layout == "packed":
        raise RecipeError(
            f"train.layout=packed: {unable.model_type} with attention={unable._attn_implementation} does not keep packed "
            "samples apart: choose sdpa or eager attention, or layout padded"
        )
    batches = _first_batches(sampler, lengths)
    packing, padding = (_micro_batches(train, batches, packed=packed) for packed in (True, False))
    apart = all(model.config._attn_implementation == "flash_attention_2" for model in models)
    width = min(int(model.config.get_text_config(decoder=True).hidden_size) for model in models)
    ratio = layout_cost(packing, width, packed=True, apart=apart) / layout_cost(padding, width, packed=False)
    packed = train.layout == "packed" or (train.layout == "auto" and unable is None and ratio < 1)
    why = f"packing costs {ratio:.2f} of padding"
    if train.layout != "auto":
        why = f"the recipe says so, {why}"
    elif unable is not None:
        why = f"{unable.model_type} with attention={unable._attn_implementation} cannot be packed"
    share = 1 - sum(int(batch.sum()) for batch in padding) / sum(len(batch) * int(batch.max()) for batch in padding)
    log.info("micro-batches are %s: %s; %.0f%% of padded tokens are padding", "packed" if packed else "padded", why, 100 * share)
    return packed


def _first_batches(sampler: Sampler, lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Lengths in the first global batches of each stage."""
    found, start = [], 0
    for stage in sampler.plan.stages:
        steps = range(start, start + min(STEPS, stage.steps))
        found += [np.asarray(lengths[sampler.batch(step)], np.int64) for step in steps]
        start += stage.steps
    return found


def _micro_batches(train: TrainConfig, batches: list[NDArray[np.int64]], *, packed: bool) -> list[NDArray[np.int64]]:
    """Lengths in the micro-batches that all ranks make of some global batches."""
    found = []
    for batch in batches:
        dealt = deal(
            batch, ranks=distributed.world_size(), micro_batch_size=train.micro_batch_size,
            micro_batch_tokens=train.micro_batch_tokens, packed=packed,
        )  # fmt: skip
        found += [batch[members] for rank in dealt for members in rank if len(members)]
    return found
