"""The check that a generator's log-probabilities depend neither on the batch nor on the backend
(`models.batch_invariance`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config import GenerationConfig
from pocl_ds.data.generated import TokenizedDataset
from pocl_ds.generation.protocol import Generator
from pocl_ds.models.batch_invariance import LogProbs, check_batch_invariance, choose_samples
from pocl_ds.models.load import empty_model, load_model, load_model_config
from pocl_ds.models.log_probs import response_log_probs

log = logging.getLogger("pocl_ds")

# Most work of a forward pass of the reference on the CPU, in FLOP, and its most parameters, whose
# float32 weights take 4 GB: about ten seconds on 16 cores.
REFERENCE_FLOP, REFERENCE_PARAMETERS = 4e12, 1e9


def choose_rows(
    dataset: TokenizedDataset, config: GenerationConfig, *, seed: int, packed: bool = False
) -> list[int]:
    """The rows of a dataset to check a generator on; none if it never batches two sequences."""
    return choose_samples(
        np.asarray(dataset.total_tokens, np.int64),
        seed=seed,
        max_tokens=config.max_num_batched_tokens,
        packed=packed,
        max_samples=config.max_num_seqs,
    )


def check_generator(
    label: str,
    generator: Generator,
    dataset: TokenizedDataset,
    rows: Sequence[int],
    *,
    dtype: str,
    remedy: str,
    reference: tuple[str, LogProbs] | None = None,
) -> dict[str, Any]:
    """Check the generator's log-probabilities of the last responses of some rows of a dataset.

    reference: see `check_batch_invariance`, with indices into `rows`. Returns what the manifest
    records. Raises ModelError.
    """
    sequences, prompt_tokens = _sequences(dataset, rows)

    def log_probs(places: Sequence[int]) -> list[NDArray[np.float32]]:
        return generator.log_probs(
            [sequences[place] for place in places], [prompt_tokens[place] for place in places]
        )

    return check_batch_invariance(
        label,
        [dataset.ids[row].decode() for row in rows],
        [len(ids) - start for ids, start in zip(sequences, prompt_tokens, strict=True)],
        log_probs,
        dtype=dtype,
        on_gpu=torch.cuda.is_available(),
        remedy=remedy,
        reference=reference,
    )


def transformers_reference(
    model_path: str,
    dataset: TokenizedDataset,
    rows: Sequence[int],
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[str, LogProbs] | None:
    """The log-probabilities of the last responses under transformers, in float32 on the CPU, to
    compare another backend with. None if they would take longer than some seconds.

    Call it before vLLM is opened, which replaces classes of transformers for some families.
    """
    config = load_model_config(model_path, trust_remote_code=trust_remote_code, revision=revision)
    sequences, prompt_tokens = _sequences(dataset, rows)
    model = load_reference_model(
        model_path,
        config,
        sum(map(len, sequences)),
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    if model is None:
        return None
    values = [
        response_log_probs(model, [ids], [start], [np.arange(1)])[0]
        for ids, start in zip(sequences, prompt_tokens, strict=True)
    ]
    return "transformers", lambda places: [values[place] for place in places]


def load_reference_model(
    model_path: str,
    config: Any,
    tokens: int,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """The model in float32 on the CPU, for a forward pass over so many tokens. None if that would
    take longer than some seconds. config: that of the model.
    """
    model = empty_model(config, trust_remote_code=trust_remote_code)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > REFERENCE_PARAMETERS or 2 * parameters * tokens > REFERENCE_FLOP:
        return None
    return load_model(model_path, trust_remote_code=trust_remote_code, revision=revision)


def _sequences(dataset: TokenizedDataset, rows: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Token ids of some rows, and how many come before the last response (at least 1)."""
    sequences = [[int(token) for token in dataset.tokens(row)] for row in rows]
    return sequences, [max(1, int(dataset.prompt_tokens[row])) for row in rows]
