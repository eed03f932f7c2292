"""In which type hidden states are stored, and what that loses: measured on a few samples before
the cache is filled.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.runtime import distributed
from pocl_ds.teachers.cache_shard import STEP
from pocl_ds.teachers.quantized_states import (
    FILE,
    QuantizedStates,
    StateStorage,
    distribution_error,
)
from pocl_ds.teachers.state_sources import HiddenStateSource

log = logging.getLogger("pocl_ds")

SAMPLES = 64  # whose states calibrate and measure
MEASURED_TOKENS = 64


def prepare_storage(
    directory: Path,
    source: HiddenStateSource,
    split: TokenizedSplit,
    rows: NDArray[np.int64],
    hidden_dtype: str,
    temperatures: Sequence[float],
) -> tuple[StateStorage, dict[str, Any]]:
    """How to store the states of a teacher's cache, and for its manifest what that loses at each
    temperature. All ranks call it together.

    directory: of the cache, whose calibration decides if it has one: finished shards depend on it.
    rows: of the split that the cache has.
    """
    if hidden_dtype == "model":
        return StateStorage(), {}
    # The states of evenly spaced samples. Every rank reads all of them, since ZeRO-3 needs all
    # ranks; with vLLM only ranks with an engine do, of which rank 0 is one.
    sampled = rows[np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows))).astype(np.int64)]
    parts = [states for _, states in source.states(split, np.unique(sampled))]
    calibration = None
    with distributed.raise_on_all_ranks("calibrate the stored hidden states"):
        if distributed.rank() == 0 and hidden_dtype == "int8":
            if not (directory / FILE).exists():
                QuantizedStates.calibrate(torch.cat(parts)[::2]).save(directory)
            calibration = QuantizedStates.load(directory)
    storage = StateStorage(hidden_dtype, distributed.broadcast_object(calibration))

    # The error of other tokens than those that calibrate.
    info: dict[str, Any] = {}
    with source.head() as head:
        if distributed.rank() == 0:
            hidden = torch.cat(parts)[1::2].to(distributed.device())
            stride = max(1, len(hidden) // MEASURED_TOKENS)
            hidden = hidden[::stride][:MEASURED_TOKENS]
            stored = storage.decode(storage.encode(hidden), hidden.dtype)
            vocab = source.vocab.to(hidden.device)
            exact, approximate = (vocab.teacher_logits(head, side) for side in (hidden, stored))
            info["error"] = [
                _error(exact, approximate, temperature, hidden_dtype)
                for temperature in temperatures
            ]
    return storage, info


def _error(
    exact: Tensor, approximate: Tensor, temperature: float, hidden_dtype: str
) -> dict[str, float]:
    """The KL divergence of a token, in nats, and the root mean square of the gradient's error; also
    logged.
    """
    tokens = max(len(exact), 1)
    kl, squares = (distribution_error(exact, approximate, temperature) / tokens).tolist()
    log.info(
        "%s: hidden states as %s: at temperature %.2f the distribution is %.1e nats from the exact "
        "one, and the gradient's error is %.1e (%d tokens)",
        STEP,
        hidden_dtype,
        temperature,
        kl,
        squares**0.5,
        len(exact),
    )
    return {"temperature": temperature, "kl": kl, "gradient_error": squares**0.5}
