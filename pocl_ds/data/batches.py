"""Micro-batches: padded ids, and where in them the loss is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.data.encode import EncodedSplit


@dataclass(frozen=True)
class Batch:
    """B samples padded on the right to T tokens; n loss tokens (responses and their EOS).

    The hidden state at t predicts token t + 1, so `positions` are one before their labels.
    """

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, from lengths: a padding id may well be a real EOS elsewhere
    positions: Tensor  # [n] int64, flat index into B * T of the hidden state that predicts a loss token
    labels: Tensor  # [n] int64
    sample_of_token: Tensor  # [n] int64, which of the B samples a loss token belongs to
    rows: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "attention_mask", "positions", "labels", "sample_of_token")
        }
        return replace(self, **moved)


def collate(split: EncodedSplit, rows: Sequence[int] | NDArray[np.int64], pad_id: int) -> Batch:
    """Pad some rows of a split into a batch."""
    picked = np.asarray(rows, np.int64)
    lengths = np.asarray(split.total_tokens[picked])
    prompts = np.asarray(split.prompt_tokens[picked])
    width = int(lengths.max(initial=1))
    ids = np.full((len(picked), width), pad_id, np.int64)
    column = np.arange(width)
    real = column < lengths[:, None]
    if len(picked):
        ids[real] = np.concatenate([split.tokens(int(row)) for row in picked])
    # Token 0 has no hidden state before it, so it is never a label, even where a prompt is empty.
    is_label = real & (column >= np.maximum(prompts, 1)[:, None])
    sample, place = np.nonzero(is_label)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(real.astype(np.int64)),
        torch.from_numpy(sample * width + place - 1),
        torch.from_numpy(ids[sample, place]),
        torch.from_numpy(sample),
        tuple(picked.tolist()),
    )
