"""Log-probabilities of responses under a causal language model.

Shapes: B sequences, T positions, D width of the hidden states, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.models.heads import has_known_head, hidden_states, identity_head, output_head

LOGIT_ROWS = 512  # positions whose logits [rows, V] are in memory together


@torch.no_grad()
def response_log_probs(
    model: Any,
    sequences: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int],
    batches: Iterable[NDArray[np.int64]],
    on_batch: Callable[[NDArray[np.int64]], object] | None = None,
) -> list[NDArray[np.float32]]:
    """Log-probability of each response token at temperature 1, in nats, one array per sequence.

    The head runs at response positions only, in float32.

    Args:
        model: a transformers causal language model.
        sequences: token ids of prompt and response.
        prompt_tokens: length of each prompt, at least 1.
        batches: indices of the sequences of each forward pass, see
            `curriculum.token_budget_batches`.
        on_batch: receives the indices of each finished batch.
    """
    split = has_known_head(model)
    head = output_head(model) if split else identity_head(model)
    results = [np.empty(0, np.float32)] * len(sequences)
    for batch in batches:
        ids, mask = pad_sequences([sequences[index] for index in batch], model.device)
        hidden = hidden_states(model, ids, mask, split=split)  # [B, T, D]
        for row, index in enumerate(batch):
            start, stop = prompt_tokens[index], len(sequences[index])
            # The hidden state at t predicts token t + 1.
            chunks = [
                head.logits(hidden[row, begin - 1 : min(begin + LOGIT_ROWS, stop) - 1])
                .float()
                .log_softmax(-1)
                .gather(1, ids[row, begin : min(begin + LOGIT_ROWS, stop), None])[:, 0]
                for begin in range(start, stop, LOGIT_ROWS)
            ]
            if chunks:
                results[index] = torch.cat(chunks).cpu().numpy()
        if on_batch is not None:
            on_batch(batch)
    return results


def pad_sequences(
    sequences: Sequence[Sequence[int]], device: torch.device, *, pad_left: bool = False
) -> tuple[Tensor, Tensor]:
    """Pad sequences to the longest, on the right or the left: ids and mask, both int64 [B, T].

    The mask follows from the lengths, not from a padding id.
    """
    width = max(len(sequence) for sequence in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        columns = slice(width - len(sequence), None) if pad_left else slice(0, len(sequence))
        ids[row, columns], mask[row, columns] = sequence, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
