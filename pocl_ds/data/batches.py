"""Batches: rows of an encoded split as tensors, padded to the longest, or packed behind one another
without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.data.generated import Sequences


@dataclass(frozen=True)
class Batch:
    """B samples padded on the right to T tokens, or packed into one row of T tokens; n loss tokens
    (responses, their EOS).

    The hidden state at t predicts token t + 1, so `positions` are one before their labels.
    """

    input_ids: Tensor  # [B, T] int64; packed: [1, T]
    attention_mask: (
        Tensor | None
    )  # [B, T] int64, from lengths: a padding id may well be a real EOS elsewhere; packed: None
    position_ids: Tensor | None  # packed: [1, T] int64, from 0 in each sample
    lengths: tuple[int, ...] | None  # packed: tokens of each sample in the row
    # [n] int64, flat index into input_ids of the hidden state that predicts a loss token
    positions: Tensor
    labels: Tensor  # [n] int64
    sample_of_token: Tensor  # [n] int64, which of the B samples a loss token belongs to
    rows: tuple[int, ...]
    split: str  # the name of the split that the rows are of
    translated: Translated | None = None  # for a teacher with another tokenizer

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[int, ...] | None]:
        """What a model's hidden states follow from: ids, mask, position ids, lengths."""
        return self.input_ids, self.attention_mask, self.position_ids, self.lengths

    def at_loss_positions(self, hidden: Tensor) -> Tensor:
        """The rows of hidden states [B, T, d] that predict a loss token: [n, d]."""
        return hidden.flatten(0, 1).index_select(0, self.positions)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return replace(
            self, **moved, translated=self.translated.to(device) if self.translated else None
        )


@dataclass(frozen=True)
class Translated:
    """A batch in the tokens of a teacher with another tokenizer: m loss tokens of its own, and
    which of both stand for the same text. A span is a stretch of a response that begins and ends
    with a token on both sides.
    """

    batch: Batch
    # [n] int64, the span of each of the student's loss tokens, ascending; -1 where there is none
    ours: Tensor
    theirs: Tensor  # [m] int64, of the teacher's
    spans: int

    def to(self, device: torch.device) -> Translated:
        """The same on a device."""
        return Translated(
            self.batch.to(device), self.ours.to(device), self.theirs.to(device), self.spans
        )


def collate(
    split: Sequences, rows: Sequence[int] | NDArray[np.int64], pad_id: int, *, packed: bool = False
) -> Batch:
    """Some rows of a split, or of responses that were written just now, as a batch.

    Without rows it is one token that nothing is learned from, so that a model can run.
    """
    picked = np.asarray(rows, np.int64)
    lengths = np.asarray(split.total_tokens[picked], np.int64)
    # Token 0 has no hidden state before it, so it is never a label, even where a prompt is empty.
    prompts = np.maximum(np.asarray(split.prompt_tokens[picked], np.int64), 1)
    sample = np.repeat(np.arange(len(picked)), lengths)
    column = np.arange(len(sample)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    tokens = (
        np.concatenate([split.tokens(int(row)) for row in picked]).astype(np.int64)
        if len(picked)
        else sample
    )
    is_label = column >= prompts[sample]
    width = int(lengths.max(initial=1))
    flat = (
        np.arange(len(sample)) if packed else sample * width + column
    )  # where each token lies in the batch
    shape = (1, max(len(sample), 1)) if packed else (max(len(picked), 1), width)
    ids = np.full(shape, pad_id, np.int64)
    ids.reshape(-1)[flat] = tokens
    mask = np.zeros(shape, np.int64)
    mask.reshape(-1)[flat] = 1
    if not len(picked):
        mask[:] = 1  # a row that attends to nothing is NaN, and NaN times the zero gradient is NaN
    places = np.zeros(shape, np.int64)
    places.reshape(-1)[flat] = column
    return Batch(
        torch.from_numpy(ids),
        None if packed else torch.from_numpy(mask),
        torch.from_numpy(places) if packed else None,
        (tuple(lengths.tolist()) or (1,)) if packed else None,
        torch.from_numpy(flat[is_label] - 1),
        torch.from_numpy(tokens[is_label]),
        torch.from_numpy(sample[is_label]),
        tuple(picked.tolist()),
        split.name,
    )
