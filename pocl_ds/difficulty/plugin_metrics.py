"""Difficulty metrics of plugins, besides ROUGE-L and cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocl_ds.errors import DataError, RecipeError


@dataclass(frozen=True)
class ScoredSamples:
    """What a metric reads of some training samples, in one order.

    prompts: the message before each response, with Alpaca's input; empty for a text without a
    prompt. responses: of the student. references: all of each sample, the training response first.
    log_probs: of the student for the scored tokens of the first reference, in nats, [tokens] each.
    With `score.span: answer` responses, references and log_probs are those of the answers.
    """

    ids: list[str]
    prompts: list[str]
    responses: list[str]
    references: list[list[str]]
    log_probs: list[NDArray[np.float32]]


Metric: TypeAlias = Callable[[ScoredSamples], Sequence[float]]  # one number per sample
METRICS: dict[str, Metric] = {}  # in addition to ROUGE-L and cross-entropy; plugins register them


def metric_values(metric: str, samples: ScoredSamples) -> list[float]:
    """The values of a plugin's metric, one finite number for each sample.

    Raises RecipeError if it returns something else, DataError if a number is not finite.
    """
    try:
        values = [float(value) for value in METRICS[metric](samples)]
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"the metric {metric!r} gives no numbers ({error}): fix its function"
        ) from error
    if len(values) != len(samples.ids):
        raise RecipeError(
            f"the metric {metric!r} gives {len(values)} numbers for {len(samples.ids)} samples: "
            "fix its function"
        )
    for sample_id, value in zip(samples.ids, values, strict=True):
        if not math.isfinite(value):
            raise DataError(
                f"sample {sample_id} has {metric}={value}, which has no rank: fix the metric's "
                "function"
            )
    return values
