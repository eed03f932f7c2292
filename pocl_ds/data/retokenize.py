"""Batches as a teacher with another tokenizer reads them: the same prompts and responses in its own
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.data.batches import Batch, TeacherView, collate
from pocl_ds.data.generated import GeneratedBatch, TokenizedDataset
from pocl_ds.data.token_alignment import common_spans, token_bytes
from pocl_ds.data.tokenized import TokenizedSplit


class TeacherRetokenizer:
    """Adds to a batch the view of a teacher with another tokenizer.

    Responses are decoded to text and tokenized again. Prompts come from splits that were tokenized
    before training with the teacher's own template.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        prompts: Mapping[str, TokenizedSplit],
        *,
        max_length: int | None,
        packed: bool,
    ) -> None:
        """prompts: the teacher's tokenized splits by name; max_length: longest sequence that the
        teacher reads, None for no limit; packed: see `collate`.
        """
        self.student_tokenizer, self.teacher_tokenizer = student_tokenizer, teacher_tokenizer
        self.student_bytes = token_bytes(student_tokenizer)
        self.teacher_bytes = token_bytes(teacher_tokenizer)
        self.prompts, self.max_length, self.packed = prompts, max_length, packed

    def __call__(self, dataset: TokenizedDataset, batch: Batch) -> Batch:
        """The batch, made from rows of `dataset`, with its `teacher_view`."""
        sequences: list[NDArray[np.uint32]] = []
        prompt_tokens: list[int] = []
        student_spans, teacher_spans, num_spans = [], [], 0
        for row in batch.rows:
            # The teacher's tokens of prompt and response.
            tokens, student_prompt_length = dataset.tokens(row), int(dataset.prompt_tokens[row])
            split, prompt_row = dataset.prompt_source(row)
            teacher_split = self.prompts[split]
            prompt = teacher_split.tokens(prompt_row)[
                : int(teacher_split.prompt_tokens[prompt_row])
            ]
            response, student_span, teacher_span = self._retokenize(tokens[student_prompt_length:])
            response, student_span, teacher_span = self._truncate(
                response, student_span, teacher_span, len(prompt)
            )

            # The first token of a sequence is never a label, so its span cannot be compared.
            if not student_prompt_length or not len(prompt):
                student_span, teacher_span = (
                    np.where(side == 0, -1, side) for side in (student_span, teacher_span)
                )
            student_spans.append(
                np.where(student_span < 0, -1, student_span + num_spans)[
                    int(not student_prompt_length) :
                ]
            )
            teacher_spans.append(
                np.where(teacher_span < 0, -1, teacher_span + num_spans)[int(not len(prompt)) :]
            )
            num_spans += _last_span(student_span, teacher_span) + 1
            sequences.append(np.concatenate([prompt, response]).astype(np.uint32))
            prompt_tokens.append(len(prompt))

        # Collate the teacher's sequences in the order of the batch.
        rows = np.arange(len(sequences))
        sample_ids = np.asarray(dataset.ids[np.array(batch.rows, np.int64)])
        retokenized = GeneratedBatch(rows, sample_ids, np.array(prompt_tokens, np.int64), sequences)
        view = TeacherView(
            collate(retokenized, rows, packed=self.packed),
            _concatenate(student_spans),
            _concatenate(teacher_spans),
            num_spans,
        )
        return replace(batch, teacher_view=view)

    def _truncate(
        self,
        response: NDArray[np.int64],
        student_span: NDArray[np.int64],
        teacher_span: NDArray[np.int64],
        prompt_length: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Cut a response to what the teacher can read, and drop the spans that the cut breaks."""
        if self.max_length is None:
            return response, student_span, teacher_span
        limit = self.max_length - prompt_length
        cut_spans, response, teacher_span = (
            teacher_span[limit:],
            response[:limit],
            teacher_span[:limit],
        )
        student_span, teacher_span = (
            np.where(np.isin(side, cut_spans), -1, side) for side in (student_span, teacher_span)
        )
        return response, student_span, teacher_span

    def _retokenize(
        self, ids: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The teacher's ids of a response, and the span of each student and teacher token.

        The EOS tokens of both sides share a separate span.
        """
        # Decode the response without its EOS, and let the teacher tokenize the text.
        has_eos = len(ids) > 0 and int(ids[-1]) == self.student_tokenizer.eos_token_id
        pieces = [
            self.student_bytes[token] if token < len(self.student_bytes) else b""
            for token in ids[: len(ids) - int(has_eos)]
        ]
        text = b"".join(pieces).decode(errors="replace")
        teacher_ids: list[int] = self.teacher_tokenizer(text, add_special_tokens=False)["input_ids"]
        student_span, teacher_span = common_spans(
            pieces, [self.teacher_bytes[token] for token in teacher_ids]
        )

        # Both EOS tokens share a span if the last tokens of both sides end at the same byte.
        if has_eos:
            teacher_ids = [*teacher_ids, self.teacher_tokenizer.eos_token_id]
            same_end = (student_span[-1:] >= 0).all() and (teacher_span[-1:] >= 0).all()
            eos_span = _last_span(student_span, teacher_span) + 1 if same_end else -1
            student_span, teacher_span = (
                np.append(student_span, eos_span),
                np.append(teacher_span, eos_span),
            )
        return np.array(teacher_ids, np.int64), student_span, teacher_span


def _last_span(student_span: NDArray[np.int64], teacher_span: NDArray[np.int64]) -> int:
    return int(max(student_span.max(initial=-1), teacher_span.max(initial=-1)))


def _concatenate(spans: list[NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *spans]))
