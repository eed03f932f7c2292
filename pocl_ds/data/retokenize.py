"""Batches as a teacher with another tokenizer reads them: the same prompts and responses in its own
tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.data.batches import Batch, TeacherView, collate
from pocl_ds.data.generated import TokenizedDataset, runs_of
from pocl_ds.data.text_encoding import TextEncoder
from pocl_ds.data.token_alignment import common_spans, token_bytes
from pocl_ds.data.tokenized import TokenizedSplit


class TeacherRetokenizer:
    """Adds to a batch the view of a teacher with another tokenizer.

    The last response is decoded to text and tokenized again. Prompts, with the earlier turns that
    train, come from splits that were tokenized before training with the teacher's own template.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        prompts: Mapping[str, TokenizedSplit],
        *,
        student_end_ids: Sequence[int],
        teacher_end_ids: Sequence[int],
        max_length: int | None,
        packed: bool,
    ) -> None:
        """prompts: the teacher's tokenized splits by name; student_end_ids, teacher_end_ids: ids
        that end a turn, the teacher's first one ends its responses; max_length: longest sequence
        that the teacher reads, None for no limit; packed: see `collate`.
        """
        self.encoder = TextEncoder(teacher_tokenizer)
        self.student_bytes = token_bytes(student_tokenizer)
        self.teacher_bytes = token_bytes(teacher_tokenizer)
        self.student_end_ids, self.teacher_end_ids = student_end_ids, teacher_end_ids
        self.prompts, self.max_length, self.packed = prompts, max_length, packed

    def __call__(self, dataset: TokenizedDataset, batch: Batch) -> Batch:
        """The batch, made from rows of `dataset`, with its `teacher_view`."""
        sequences: list[_Sequence] = []
        student_spans: list[NDArray[np.int64]] = []
        num_spans = 0
        for row in batch.rows:
            student, teacher = self._pair(dataset, row)
            for side in (student, teacher):
                side.spans[side.spans >= 0] += num_spans
            num_spans = max(num_spans, student.num_spans, teacher.num_spans)
            student_spans.append(student.label_spans)
            sequences.append(teacher)

        # Collate the teacher's sequences in the order of the batch.
        view = TeacherView(
            collate(_TeacherSequences(sequences), range(len(sequences)), packed=self.packed),
            _concatenate(student_spans),
            _concatenate([sequence.label_spans for sequence in sequences]),
            num_spans,
        )
        return replace(batch, teacher_view=view)

    def _pair(self, dataset: TokenizedDataset, row: int) -> tuple[_Sequence, _Sequence]:
        """The tokens of one sample as both sides read them, with the spans of their labels."""
        # The prompts of both sides, and the last response in the teacher's tokens.
        split, prompt_row = dataset.prompt_source(row)
        own = self.prompts[split]
        prompt_length, own_length = (
            int(lengths[index])
            for lengths, index in ((dataset.prompt_tokens, row), (own.prompt_tokens, prompt_row))
        )
        tokens = np.asarray(dataset.tokens(row), np.int64)
        response = self._retokenize(tokens[prompt_length:])
        own_tokens = np.concatenate([own.tokens(prompt_row)[:own_length], response])
        student = _Sequence(tokens, np.array(dataset.loss_mask(row)))
        teacher_mask = np.zeros(len(own_tokens), np.bool_)
        teacher = _Sequence(own_tokens.astype(np.int64), teacher_mask)

        # Earlier turns pair from the last one back, since a prompt loses its earliest turns first.
        earlier = runs_of(student.mask[:prompt_length])
        own_earlier = runs_of(own.loss_mask(prompt_row)[:own_length])
        pairs = list(zip(reversed(earlier), reversed(own_earlier), strict=False))[::-1]
        last = (slice(prompt_length, len(tokens)), slice(own_length, len(own_tokens)))
        next_span = 0
        for part, own_part in [*pairs, last]:
            spans, own_spans = self._align(tokens[part], teacher.tokens[own_part])
            student.spans[part] = np.where(spans < 0, -1, spans + next_span)
            teacher.spans[own_part] = np.where(own_spans < 0, -1, own_spans + next_span)
            teacher.mask[own_part] = True
            next_span = max(student.num_spans, teacher.num_spans)
        student.spans[~student.mask] = -1

        # Drop the spans of tokens that are no labels, and of those that the teacher cannot read.
        beyond = teacher.truncate(self.max_length)
        for side in (student, teacher):
            beyond = np.append(beyond, side.spans[:1])
        for side in (student, teacher):
            side.spans[np.isin(side.spans, beyond)] = -1
        return student, teacher

    def _retokenize(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The teacher's ids of a response, with the end of its turn if the response has one.

        Bytes of an incomplete character at the end have no text, and so no ids.
        """
        end = _first_index(ids, self.student_end_ids)
        text_bytes = b"".join(_pieces(ids[:end], self.student_bytes))
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(text_bytes)
        teacher_ids = self.encoder.encode_continuation(text).ids if text else []
        if end < len(ids):
            teacher_ids = [*teacher_ids, self.teacher_end_ids[0]]
        return np.array(teacher_ids, np.int64)

    def _align(
        self, ids: NDArray[np.int64], teacher_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The span of each student and teacher token of one turn, from 0; -1 for none.

        The tokens that end the turn share a separate span, if the last tokens before them end at
        the same byte.
        """
        end = _first_index(ids, self.student_end_ids)
        teacher_end = _first_index(teacher_ids, self.teacher_end_ids)
        spans, teacher_spans = (np.full(len(side), -1, np.int64) for side in (ids, teacher_ids))
        spans[:end], teacher_spans[:teacher_end] = common_spans(
            _pieces(ids[:end], self.student_bytes),
            _pieces(teacher_ids[:teacher_end], self.teacher_bytes),
        )
        same_end = (spans[:end][-1:] >= 0).all() and (teacher_spans[:teacher_end][-1:] >= 0).all()
        if same_end and end < len(ids) and teacher_end < len(teacher_ids):
            last = max(spans.max(initial=-1), teacher_spans.max(initial=-1)) + 1
            spans[end] = teacher_spans[teacher_end] = last
        return spans, teacher_spans


@dataclass
class _Sequence:
    """The tokens of one sample, which of them train, and the span of each."""

    tokens: NDArray[np.int64]
    mask: NDArray[np.bool_]
    spans: NDArray[np.int64] = field(init=False)  # -1 for none

    def __post_init__(self) -> None:
        self.spans = np.full(len(self.tokens), -1, np.int64)

    @property
    def num_spans(self) -> int:
        """The largest span plus 1."""
        return int(self.spans.max(initial=-1)) + 1

    @property
    def label_spans(self) -> NDArray[np.int64]:
        """The spans of the labels: the tokens that train, without token 0."""
        return self.spans[1:][self.mask[1:]]

    def truncate(self, length: int | None) -> NDArray[np.int64]:
        """Cut the sequence to a length, and return the spans of the tokens that were cut."""
        cut = self.spans[length:] if length is not None else self.spans[:0]
        self.tokens, self.mask = self.tokens[:length], self.mask[:length]
        self.spans = self.spans[:length]
        return cut


class _TeacherSequences:
    """The teacher's sequences of a batch (a `TokenizedDataset`)."""

    name = "teacher"

    def __init__(self, sequences: Sequence[_Sequence]) -> None:
        self.sequences = sequences
        self.ids = np.zeros(len(sequences), "S1")
        self.total_tokens = np.array([len(s.tokens) for s in sequences], np.int64)
        self.prompt_tokens = np.zeros(len(sequences), np.int64)
        self.loss_tokens = np.array([len(s.label_spans) for s in sequences], np.int64)

    def __len__(self) -> int:
        return len(self.sequences)

    def tokens(self, row: int) -> NDArray[np.uint32]:
        """See `TokenizedDataset`."""
        return self.sequences[row].tokens.astype(np.uint32)

    def loss_mask(self, row: int) -> NDArray[np.bool_]:
        """See `TokenizedDataset`."""
        return self.sequences[row].mask

    def prompt_source(self, row: int) -> tuple[str, int]:
        """See `TokenizedDataset`."""
        return self.name, row


def _pieces(ids: NDArray[np.int64], tokens: Sequence[bytes]) -> list[bytes]:
    """The bytes of each id; an id without a token has none."""
    return [tokens[token] if token < len(tokens) else b"" for token in ids]


def _first_index(ids: NDArray[np.int64], targets: Sequence[int]) -> int:
    """Index of the first id that is one of `targets`, or the length."""
    positions = np.flatnonzero(np.isin(ids, targets))
    return int(positions[0]) if len(positions) else len(ids)


def _concatenate(spans: list[NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *spans]))
