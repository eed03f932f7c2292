"""A sample's log-probabilities do not depend on its batch: a check on a few samples before a step
uses a model.

Padding, packing, kernels or a model's own code can make a forward pass depend on the other samples
of the batch, or a backend disagree with another one. Nothing would show it later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocl_ds.errors import ModelError

log = logging.getLogger("pocl_ds")

# Log-probabilities in nats of some samples, given as indices into the checked ones, that run as one
# batch: one array per sample, of one number per token or of their sum.
LogProbs: TypeAlias = Callable[[Sequence[int]], Sequence[NDArray[Any]]]

# Largest accepted difference in nats between two computations of a response's log-probability, by
# dtype: (per token, per response). Short responses need the second, as their rounding errors do not
# average out. Logits near 26 are 0.125 apart in bfloat16.
TOLERANCE = {"float32": (1e-3, 0.0), "bfloat16": (0.1, 0.5), "float16": (0.1, 0.5)}
# On a GPU vLLM's attention multiplies float32 as TF32.
GPU_TOLERANCE = {**TOLERANCE, "float32": (1e-2, 0.05)}
MOST_SAMPLES = 4  # that are compared


def choose_samples(
    lengths: NDArray[np.int64],
    *,
    seed: int,
    max_tokens: int,
    packed: bool,
    max_samples: int | None = None,
) -> list[int]:
    """Rows of up to four samples that fit into one batch: the longest, the shortest, the median one
    and a random one, without repetitions. Empty if no two samples fit into a batch.

    lengths: tokens of each sample. max_tokens: of a batch, padding included. packed: no padding.
    """
    ascending = np.argsort(lengths, kind="stable")
    sizes = np.asarray(lengths, np.int64)[ascending]
    if len(sizes) < 2 or (max_samples is not None and max_samples < 2):
        return []

    # The longest sample that fits into a batch with another one.
    needed = sizes + sizes[0] if packed else 2 * sizes
    fitting = int(np.searchsorted(needed, max_tokens, side="right"))
    if fitting < 2:
        return []
    last = fitting - 1
    random = np.random.default_rng(seed).integers(fitting, size=4 * MOST_SAMPLES).tolist()
    chosen = [last, 0]
    for place in (last // 2, *random):
        tokens = int(sizes[[*chosen, place]].sum()) if packed else (len(chosen) + 1) * sizes[last]
        full = len(chosen) >= min(MOST_SAMPLES, max_samples or MOST_SAMPLES)
        if place not in chosen and tokens <= max_tokens and not full:
            chosen.append(place)
    return [int(ascending[place]) for place in chosen]


def check_batch_invariance(
    label: str,
    samples: Sequence[str],
    tokens: Sequence[int],
    log_probs: LogProbs,
    *,
    dtype: str,
    remedy: str,
    on_gpu: bool = False,
    reference: tuple[str, LogProbs] | None = None,
) -> dict[str, Any]:
    """Compare the log-probabilities of samples that run alone with those in one batch, and with a
    reference.

    Args:
        label: what computes them, for the log and the message: `score: the student in vllm`.
        samples: their ids; none if the step never batches two samples.
        tokens: the response tokens of each sample.
        dtype: of the computation, for the tolerance.
        remedy: what to do if they differ: an imperative.
        reference: the name of another computation, and its log-probabilities of the samples alone.

    Returns:
        For the step's manifest: the number of samples, and the largest difference found in nats per
        response token.

    Raises:
        ModelError: they differ by more than rounding.
    """
    if not samples:
        return {"samples": 0}
    places = range(len(samples))
    alone = [_float64(log_probs([place])[0]) for place in places]
    comparisons = {f"in a batch of {len(samples)}": list(map(_float64, log_probs(places)))}
    if reference is not None:
        name, other = reference
        comparisons[f"in {name}"] = [_float64(other([place])[0]) for place in places]

    # Find the largest difference, relative to the tolerance.
    per_token, per_response = (GPU_TOLERANCE if on_gpu else TOLERANCE)[dtype]
    largest = 0.0
    for kind, values in comparisons.items():
        for place in places:
            difference = _difference(values[place], alone[place])
            count = max(1, tokens[place])
            if not difference <= per_token * count + per_response:  # also true for a NaN
                raise ModelError(
                    f"{label}: the cross-entropy of sample {samples[place]} "
                    f"({count} response tokens) is {-alone[place].sum():.4f} nats "
                    f"alone and {-values[place].sum():.4f} {kind}, {difference / count:.4f} nats a "
                    f"token apart, where rounding in {dtype} explains "
                    f"{per_token + per_response / count:.4f}: {remedy}"
                )
            largest = max(largest, difference / count)
    log.info(
        "%s: %d samples have the same log-probabilities alone and %s, up to %.1e nats a token",
        label,
        len(samples),
        " and ".join(comparisons),
        largest,
    )
    return {"samples": len(samples), "largest_difference": largest}


def _difference(values: NDArray[np.float64], batched: NDArray[np.float64]) -> float:
    """The sum of absolute differences per token, or of two sums if one side has only a sum."""
    if values.shape != batched.shape:
        values, batched = values.sum(keepdims=True), batched.sum(keepdims=True)
    return float(np.abs(values - batched).sum())


def _float64(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(values, np.float64)
