"""Sequences to train on, wherever they come from: a split on disk, or responses that were written
just now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Sequences(Protocol):
    """Prompts and responses as token ids, by row."""

    name: str
    ids: NDArray[np.bytes_]
    prompt_tokens: NDArray[np.int64]
    total_tokens: NDArray[np.int64]

    def __len__(self) -> int: ...

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """Loss positions of each sequence: [sequences]."""

    def tokens(self, row: int) -> NDArray[np.uint32]:
        """All ids of a sequence: [total_tokens]."""

    def prompt_of(self, row: int) -> tuple[str, int]:
        """The split of the data, and the row of it, that a sequence's prompt stands in."""


def count_loss_tokens(
    total_tokens: NDArray[np.int64], prompt_tokens: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Loss positions of sequences of these lengths. Token 0 has no hidden state before it, so it is
    never a label.
    """
    found: NDArray[np.int64] = total_tokens - np.maximum(prompt_tokens, 1)
    return found


@dataclass
class Written:
    """Responses of a model to prompts of a split, in memory. rows: which samples of the split the
    prompts are of.
    """

    rows: NDArray[np.int64]
    ids: NDArray[np.bytes_]
    prompt_tokens: NDArray[np.int64]
    texts: list[NDArray[np.uint32]]  # prompt and response
    name: str = "written"
    source: str = "train"
    total_tokens: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.total_tokens = np.array([len(text) for text in self.texts], np.int64)

    @classmethod
    def of(
        cls,
        split: Sequences,
        rows: NDArray[np.int64],
        responses: Sequence[Sequence[int]],
        *,
        eos_id: int,
        longest: int,
        allowed: NDArray[np.bool_],
    ) -> Written:
        """Responses to the prompts of some rows, cut where one grows beyond `longest` tokens,
        prompt included, or names an id that takes no part in the loss; where nothing is left, EOS
        alone.
        """
        prompts, texts = np.asarray(split.prompt_tokens[rows], np.int64), []
        for row, prompt, response in zip(rows, prompts, responses, strict=True):
            kept = np.asarray(response[: longest - int(prompt)], np.int64)
            outside = np.flatnonzero(
                (kept >= len(allowed)) | ~allowed[np.minimum(kept, len(allowed) - 1)]
            )
            kept = kept[: outside[0]] if len(outside) else kept
            kept = kept if len(kept) else np.array([eos_id])
            texts.append(
                np.concatenate([np.asarray(split.tokens(int(row))[:prompt]), kept]).astype(
                    np.uint32
                )
            )
        return cls(np.asarray(rows), np.asarray(split.ids[rows]), prompts, texts)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """See `Sequences`."""
        return count_loss_tokens(self.total_tokens, self.prompt_tokens)

    def tokens(self, row: int) -> NDArray[np.uint32]:
        """See `Sequences`."""
        return self.texts[row]

    def prompt_of(self, row: int) -> tuple[str, int]:
        """See `Sequences`."""
        return self.source, int(self.rows[row])

    def picked(self, places: NDArray[np.int64]) -> Written:
        """Some of them."""
        return Written(
            self.rows[places],
            self.ids[places],
            self.prompt_tokens[places],
            [self.texts[int(i)] for i in places],
        )

    def joined(self, other: Written) -> Written:
        """These, then others."""
        rows, prompts = (
            np.concatenate([getattr(self, n), getattr(other, n)]) for n in ("rows", "prompt_tokens")
        )
        return Written(
            rows, np.concatenate([self.ids, other.ids]), prompts, [*self.texts, *other.texts]
        )
