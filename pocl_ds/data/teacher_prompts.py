"""Batches for a teacher that shares the student's vocabulary and reads its own prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocl_ds.data.batches import Batch, collate
from pocl_ds.data.conversation import Sample
from pocl_ds.data.generated import GeneratedBatch, TokenizedDataset
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.data.tokenized import TokenizedSplit

PROBE = Sample.from_instruction("probe", "QUESTION", "ANSWER")


class TeacherPrompts:
    """Adds to a batch what the teacher reads: its own prompts, with the same responses.

    Every response has the same loss tokens in both, so that the teacher's outputs belong to the
    student's labels one by one.
    """

    def __init__(
        self,
        prompts: Mapping[str, TokenizedSplit],
        to_teacher: Callable[[Tensor], Tensor],
        *,
        packed: bool,
    ) -> None:
        """prompts: the teacher's tokenized splits by name; to_teacher: the teacher's ids of the
        student's; packed: see `collate`.
        """
        self.prompts, self.to_teacher, self.packed = prompts, to_teacher, packed

    def __call__(self, dataset: TokenizedDataset, batch: Batch) -> Batch:
        """The batch, made from rows of `dataset`, with its `teacher_batch`."""
        sequences: list[NDArray[np.uint32]] = []
        lengths: list[int] = []
        for row in batch.rows:
            split, prompt_row = dataset.prompt_source(row)
            own = self.prompts[split]
            length = int(own.prompt_tokens[prompt_row])
            response = dataset.tokens(row)[int(dataset.prompt_tokens[row]) :]
            ids = self.to_teacher(torch.from_numpy(response.astype(np.int64))).numpy()
            sequences.append(
                np.concatenate([own.tokens(prompt_row)[:length], ids]).astype(np.uint32)
            )
            lengths.append(length)
        rows = np.arange(len(sequences))
        names = np.asarray(dataset.ids[np.array(batch.rows, np.int64)])
        own_batch = GeneratedBatch(rows, names, np.array(lengths, np.int64), sequences)
        return replace(batch, teacher_batch=collate(own_batch, rows, packed=self.packed))


def compare_prompts(student: SampleTokenizer, teacher: SampleTokenizer) -> str:
    """How the prompts of a teacher's own tokenizer and template differ from the student's; empty
    if they do not.
    """
    sides = (student, teacher)
    texts = [side.render_prompt(PROBE) for side in sides]
    if texts[0] != texts[1]:
        return f"the student's prompt is {texts[0]!r}, the teacher's own is {texts[1]!r}"
    tokens = [side.tokenizer.convert_ids_to_tokens(side.tokenize_prompt(PROBE)) for side in sides]
    begins = [
        bool(names) and names[0] == side.tokenizer.bos_token
        for side, names in zip(sides, tokens, strict=True)
    ]
    if begins[0] != begins[1]:
        with_bos, without = ("teacher", "student") if begins[1] else ("student", "teacher")
        return f"the {with_bos}'s tokenizer begins a prompt with BOS, and the {without}'s does not"
    return ""
