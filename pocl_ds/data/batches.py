"""Batches of a tokenized dataset as tensors: padded to the longest sample, or packed in one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.data.generated import TokenizedDataset

# Fields of a batch with one entry for each loss token.
LOSS_TOKEN_FIELDS = (
    "positions",
    "labels",
    "sample_of_token",
    "teacher_outputs",
    "token_positions",
    "token_weights",
)


@dataclass(frozen=True)
class Batch:
    """B samples with n loss tokens (responses and their EOS).

    A padded batch has B rows of T tokens, padded on the right. A packed batch has one row of T
    tokens in which the samples follow one another. The hidden state at t predicts token t + 1, so
    `positions` are one before their labels.
    """

    input_ids: Tensor  # [B, T] int64; packed: [1, T]
    # [B, T] int64, from lengths, since the padding id may be a real EOS elsewhere; packed: None
    attention_mask: Tensor | None
    position_ids: Tensor | None  # packed: [1, T] int64, from 0 in each sample
    lengths: tuple[int, ...] | None  # packed: tokens of each sample in the row
    # [n] int64, flat index into input_ids of the hidden state that predicts a loss token
    positions: Tensor
    labels: Tensor  # [n] int64
    sample_of_token: Tensor  # [n] int64, which of the B samples a loss token belongs to
    rows: tuple[int, ...]  # of the split
    split: str  # name of the split
    teacher_view: TeacherView | None = None  # for a teacher with another tokenizer
    teacher_batch: Batch | None = None  # for a teacher with its own prompts: the same loss tokens
    teacher_number: int = 0  # which of several teachers its samples have
    # Of a cached teacher, see `Teacher.outputs`; read together with the batch.
    teacher_outputs: Tensor | None = None
    # Number of the request for the outputs of a teacher on its own ranks; None: not requested
    teacher_request: int | None = None
    # [B] float32, factor of each sample's loss; None: every sample counts once
    sample_weights: Tensor | None = None
    # Of a part of a row: which of the row's loss tokens it has, and `position_in_sample` of these,
    # [n] float32. None: the batch has the complete row.
    loss_token_range: slice | None = None
    token_positions: Tensor | None = None
    # [n] float32, further factor of each loss token's loss; None: 1
    token_weights: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[int, ...] | None]:
        """The inputs of `hidden_states`: ids, mask, position ids, lengths."""
        return self.input_ids, self.attention_mask, self.position_ids, self.lengths

    def at_loss_positions(self, hidden: Tensor) -> Tensor:
        """Select from hidden states [B, T, d] those that predict a loss token: [n, d]."""
        return hidden.flatten(0, 1).index_select(0, self.positions)

    def of_sample(self, sample: int) -> Batch:
        """The same batch with the loss tokens of one of its samples only. It still has B samples,
        so that `sample_weights` stay as they are.
        """
        return self._with_loss_tokens(self.sample_of_token == sample)

    def sequence_shard(self, part: int, parts: int) -> Batch:
        """One of `parts` equal parts of a packed row, counted from 0: its tokens, [1, T / parts],
        and the loss tokens that they predict. `lengths` stay those of the row, whose end is filled
        with a sample of padding if `parts` does not divide T.
        """
        assert self.lengths is not None and self.position_ids is not None, "the row is not packed"
        padding = -sum(self.lengths) % parts
        filler = torch.arange(padding)[None]
        ids = torch.cat([self.input_ids, torch.zeros_like(filler)], 1).chunk(parts, 1)[part]
        first = part * ids.shape[1]
        is_own = (self.positions >= first) & (self.positions < first + ids.shape[1])
        start, count = int((self.positions < first).sum()), int(is_own.sum())
        shard = replace(
            self,
            input_ids=ids,
            position_ids=torch.cat([self.position_ids, filler], 1).chunk(parts, 1)[part],
            lengths=(*self.lengths, padding) if padding else self.lengths,
            positions=self.positions - first,
            loss_token_range=slice(start, start + count),
            token_positions=position_in_sample(self.sample_of_token, torch.float32),
        )
        return shard._with_loss_tokens(is_own)

    def _with_loss_tokens(self, chosen: Tensor) -> Batch:
        """The same batch with some of its loss tokens only: [n] bool."""
        values = {name: getattr(self, name) for name in LOSS_TOKEN_FIELDS}
        return replace(self, **{name: v[chosen] for name, v in values.items() if v is not None})

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with a function applied to each of its tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {
            name: function(value) if isinstance(value, Tensor) else value.map_tensors(function)
            for name, value in values.items()
            if isinstance(value, (Tensor, TeacherView, Batch))
        }
        return replace(self, **mapped)

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class TeacherView:
    """The same samples in the tokens of a teacher with another tokenizer, with m loss tokens.

    A span is a stretch of a response that begins and ends at a token boundary of both tokenizers.
    """

    batch: Batch
    student_spans: Tensor  # [n] int64, ascending: the span of each student loss token, -1 for none
    teacher_spans: Tensor  # [m] int64: the same for the teacher's loss tokens
    num_spans: int

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> TeacherView:
        """See `Batch`."""
        return replace(
            self,
            batch=self.batch.map_tensors(function),
            student_spans=function(self.student_spans),
            teacher_spans=function(self.teacher_spans),
        )


def place_in_sample(samples: Tensor) -> Tensor:
    """[n]: the index of each loss token among those of its sample. samples: [n], the sample of each
    token; the tokens of a sample follow one another.
    """
    index = torch.arange(len(samples), device=samples.device)
    if not len(samples):
        return index
    is_start = torch.cat([samples.new_full((1,), -1), samples[:-1]]) != samples
    return index - torch.cummax(torch.where(is_start, index, 0), 0).values


def position_in_sample(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """[n]: 0 at the first loss token of each sample to 1 at its last; 0 if it is the only one.
    samples: as in `place_in_sample`.
    """
    before, after = place_in_sample(samples), place_in_sample(samples.flip(0)).flip(0)
    return before.to(dtype) / (before + after).clamp(min=1)


def collate(
    dataset: TokenizedDataset,
    rows: Sequence[int] | NDArray[np.int64],
    *,
    packed: bool = False,
    last_responses: bool = False,
) -> Batch:
    """Build a batch of some rows of a dataset, padded or packed.

    last_responses: the loss tokens are those of each sample's last response, whatever trains.

    Padding is id 0, which every model has a row for: masks come from lengths, so its id has no
    effect. Without rows the batch is a single token without a loss, so that a model can still run
    on it.
    """
    indices = np.asarray(rows, np.int64)
    lengths = np.asarray(dataset.total_tokens[indices], np.int64)

    # One entry per token: its sample, its column within the sample, its id.
    sample = np.repeat(np.arange(len(indices)), lengths)
    column = np.arange(len(sample)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    tokens = (
        np.concatenate([dataset.tokens(int(row)) for row in indices]).astype(np.int64)
        if len(indices)
        else sample
    )
    # Token 0 has no hidden state before it, so it is never a label.
    if last_responses:
        prompt_tokens = np.asarray(dataset.prompt_tokens[indices], np.int64)
        is_label = column >= np.maximum(prompt_tokens, 1)[sample]
    else:
        masks = [dataset.loss_mask(int(row)) for row in indices]
        is_label = np.concatenate(masks) & (column > 0) if masks else sample.astype(np.bool_)

    # Write the tokens to their places in the batch.
    width = int(lengths.max(initial=1))
    flat_index = np.arange(len(sample)) if packed else sample * width + column
    shape = (1, max(len(sample), 1)) if packed else (max(len(indices), 1), width)
    input_ids = np.zeros(shape, np.int64)
    input_ids.reshape(-1)[flat_index] = tokens
    mask = np.zeros(shape, np.int64)
    mask.reshape(-1)[flat_index] = 1
    if not len(indices):
        mask[:] = 1  # a row that attends to nothing gives NaN, and NaN times zero is NaN
    position_ids = np.zeros(shape, np.int64)
    position_ids.reshape(-1)[flat_index] = column
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=None if packed else torch.from_numpy(mask),
        position_ids=torch.from_numpy(position_ids) if packed else None,
        lengths=(tuple(lengths.tolist()) or (1,)) if packed else None,
        positions=torch.from_numpy(flat_index[is_label] - 1),
        labels=torch.from_numpy(tokens[is_label]),
        sample_of_token=torch.from_numpy(sample[is_label]),
        rows=tuple(indices.tolist()),
        split=dataset.name,
    )
