"""A batch as a teacher with another tokenizer reads it: the same prompts and responses in its own
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.data.batches import Batch, Translated, collate
from pocl_ds.data.generated import Sequences, Written
from pocl_ds.data.token_alignment import common_spans, token_bytes
from pocl_ds.data.tokenized import EncodedSplit


class Translator:
    """Adds to batches what the teacher reads. Responses go from ids to text and into the teacher's
    ids, whoever wrote them; prompts were encoded before training, with the teacher's own template.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        prompts: Mapping[str, EncodedSplit],
        *,
        longest: int | None,
        packed: bool,
    ) -> None:
        """student, teacher: tokenizers; prompts: by split; longest: tokens that the teacher can
        read; packed: see `collate`.
        """
        self.student, self.teacher, self.prompts = student, teacher, prompts
        self.pieces = token_bytes(student), token_bytes(teacher)
        self.longest, self.packed = longest, packed

    def __call__(self, split: Sequences, batch: Batch) -> Batch:
        """The batch of rows of `split`, with `translated`."""
        sequences, theirs, ours, spans = [], [], [], 0
        for row in batch.rows:
            tokens, prompt = split.tokens(row), int(split.prompt_tokens[row])
            source, number = split.prompt_of(row)
            asked = self.prompts[source]
            question = asked.tokens(number)[: int(asked.prompt_tokens[number])]
            response, left, right = self._response(tokens[prompt:])
            if self.longest is not None:
                room = self.longest - len(question)
                lost, response, right = right[room:], response[:room], right[:room]
                left, right = (np.where(np.isin(side, lost), -1, side) for side in (left, right))
            if not prompt or not len(
                question
            ):  # a text's first token is predicted by nothing, and is no label
                left, right = (np.where(side == 0, -1, side) for side in (left, right))
            ours.append(np.where(left < 0, -1, left + spans)[int(not prompt) :])
            theirs.append(np.where(right < 0, -1, right + spans)[int(not len(question)) :])
            spans += int(max(left.max(initial=-1), right.max(initial=-1))) + 1
            sequences.append(
                (np.concatenate([question, response]).astype(np.uint32), len(question))
            )
        sizes = np.array([size for _, size in sequences], np.int64)
        names = np.asarray(split.ids[np.array(batch.rows, np.int64)])
        written = Written(np.arange(len(sequences)), names, sizes, [text for text, _ in sequences])
        read = collate(
            written, np.arange(len(written)), self.teacher.pad_token_id, packed=self.packed
        )
        left_spans, right_spans = (
            torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))
            for parts in (ours, theirs)
        )
        return replace(batch, translated=Translated(read, left_spans, right_spans, spans))

    def _response(
        self, ids: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The teacher's ids of a response, and the span of each token of both; the two EOS are a
        span of their own.
        """
        ends = len(ids) > 0 and int(ids[-1]) == self.student.eos_token_id
        ours = [
            self.pieces[0][token] if token < len(self.pieces[0]) else b""
            for token in ids[: len(ids) - int(ends)]
        ]
        text = b"".join(ours).decode(errors="replace")
        read: list[int] = self.teacher(text, add_special_tokens=False)["input_ids"]
        left, right = common_spans(ours, [self.pieces[1][token] for token in read])
        if ends:
            read = [*read, self.teacher.eos_token_id]
            whole = (left[-1:] >= 0).all() and (
                right[-1:] >= 0
            ).all()  # else the two have not read the same text
            last = int(max(left.max(initial=-1), right.max(initial=-1))) + 1 if whole else -1
            left, right = np.append(left, last), np.append(right, last)
        return np.array(read, np.int64), left, right
