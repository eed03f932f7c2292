"""Token sequences for training: the protocol of a tokenized dataset, and generated responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TokenizedDataset(Protocol):
    """Prompts and responses as token ids, by row."""

    name: str
    ids: NDArray[np.bytes_]  # sample ids, [samples]
    prompt_tokens: NDArray[np.int64]  # before the last response: [samples]
    total_tokens: NDArray[np.int64]  # prompt and response, [samples]

    def __len__(self) -> int: ...

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """Number of loss tokens of each sample: [samples]."""

    def tokens(self, row: int) -> NDArray[np.uint32]:
        """Token ids of prompt and response of one sample: [total_tokens]."""

    def loss_mask(self, row: int) -> NDArray[np.bool_]:
        """Which tokens of one sample train: [total_tokens]. Token 0 is never a label, even if it
        is marked, since no hidden state is before it.
        """

    def prompt_source(self, row: int) -> tuple[str, int]:
        """The split, and the row of that split, that holds the prompt of sample `row`."""


def runs_of(mask: NDArray[np.bool_]) -> list[slice]:
    """The runs of true values in a mask [n], in order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [slice(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


@dataclass
class GeneratedBatch:
    """Responses that a model generated for prompts of a split, in memory (a `TokenizedDataset`)."""

    rows: NDArray[np.int64]  # of the split `source`, whose prompts these are
    ids: NDArray[np.bytes_]
    prompt_tokens: NDArray[np.int64]
    sequences: list[NDArray[np.uint32]]  # token ids of prompt and response
    name: str = "generated"
    source: str = "train"
    total_tokens: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.total_tokens = np.array([len(sequence) for sequence in self.sequences], np.int64)

    @classmethod
    def from_responses(
        cls,
        split: TokenizedDataset,
        rows: NDArray[np.int64],
        responses: Sequence[Sequence[int]],
        *,
        end_of_turn_id: int,
        max_length: int,
        allowed: NDArray[np.bool_],
    ) -> GeneratedBatch:
        """Join the prompts of `rows` with their responses.

        A response is cut where prompt and response exceed `max_length` tokens, and before the
        first id that `allowed` [vocabulary] excludes from the loss. An empty response becomes the
        end of its turn.
        """
        prompt_tokens, sequences = np.asarray(split.prompt_tokens[rows], np.int64), []
        for row, prompt_length, response in zip(rows, prompt_tokens, responses, strict=True):
            tokens = np.asarray(response[: max_length - int(prompt_length)], np.int64)
            disallowed = np.flatnonzero(
                (tokens >= len(allowed)) | ~allowed[np.minimum(tokens, len(allowed) - 1)]
            )
            tokens = tokens[: disallowed[0]] if len(disallowed) else tokens
            tokens = tokens if len(tokens) else np.array([end_of_turn_id])
            prompt = np.asarray(split.tokens(int(row))[:prompt_length])
            sequences.append(np.concatenate([prompt, tokens]).astype(np.uint32))
        return cls(np.asarray(rows), np.asarray(split.ids[rows]), prompt_tokens, sequences)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """See `TokenizedDataset`."""
        counts: NDArray[np.int64] = self.total_tokens - np.maximum(self.prompt_tokens, 1)
        return counts

    def loss_mask(self, row: int) -> NDArray[np.bool_]:
        """See `TokenizedDataset`."""
        return np.arange(int(self.total_tokens[row])) >= int(self.prompt_tokens[row])

    def tokens(self, row: int) -> NDArray[np.uint32]:
        """See `TokenizedDataset`."""
        return self.sequences[row]

    def prompt_source(self, row: int) -> tuple[str, int]:
        """See `TokenizedDataset`."""
        return self.source, int(self.rows[row])

    def select(self, indices: NDArray[np.int64]) -> GeneratedBatch:
        """The samples at these indices, in their order."""
        return GeneratedBatch(
            self.rows[indices],
            self.ids[indices],
            self.prompt_tokens[indices],
            [self.sequences[int(i)] for i in indices],
        )

    def concatenate(self, other: GeneratedBatch) -> GeneratedBatch:
        """The samples of this batch, followed by those of another."""
        return GeneratedBatch(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.prompt_tokens, other.prompt_tokens]),
            [*self.sequences, *other.sequences],
        )
