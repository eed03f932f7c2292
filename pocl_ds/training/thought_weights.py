"""The weight of each loss token by whether it belongs to a thought or to an answer
(`loss.thought_weight`; docs/method.md, eq. 34).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.generated import TokenizedDataset, runs_of
from pocl_ds.data.thought_spans import ThoughtFinder
from pocl_ds.data.tokenized import TokenizedSplit


class ThoughtWeights:
    """Gives the tokens of thoughts, with their tags, one weight, and all other loss tokens 1.

    Each turn that trains may begin with a thought.
    """

    def __init__(self, finder: ThoughtFinder, weight: float) -> None:
        self.finder, self.weight = finder, weight
        # Of each row of a split on disk: loss tokens of thoughts, -1 before they were counted.
        self._counts: dict[str, NDArray[np.int64]] = {}

    def of_tokens(self, dataset: TokenizedDataset, row: int) -> NDArray[np.float32]:
        """Weights of the loss tokens of a sample, [loss tokens]."""
        mask = self._loss_mask(dataset, row)
        weights = np.where(self._thought_mask(dataset, row, mask), self.weight, 1.0)
        return weights[mask].astype(np.float32)

    def total(self, dataset: TokenizedDataset, rows: NDArray[np.int64]) -> float:
        """Sum of the weights of all loss tokens of these samples."""
        thoughts = sum(self._count(dataset, int(row)) for row in rows)
        return int(dataset.loss_tokens[rows].sum()) - thoughts + self.weight * thoughts

    def _count(self, dataset: TokenizedDataset, row: int) -> int:
        if not isinstance(dataset, TokenizedSplit):
            return int(self._thought_mask(dataset, row, self._loss_mask(dataset, row)).sum())
        counts = self._counts.setdefault(dataset.name, np.full(len(dataset), -1, np.int64))
        if counts[row] < 0:
            mask = self._loss_mask(dataset, row)
            counts[row] = self._thought_mask(dataset, row, mask).sum()
        return int(counts[row])

    def _thought_mask(
        self, dataset: TokenizedDataset, row: int, loss_mask: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Which loss tokens of a sample belong to a thought: [total_tokens]."""
        tokens, mask = dataset.tokens(row), np.zeros(len(loss_mask), np.bool_)
        for turn in runs_of(loss_mask):
            length = self.finder.thought_tokens(tokens[: turn.start], tokens[turn])
            mask[turn.start : turn.start + length] = True
        return mask

    def _loss_mask(self, dataset: TokenizedDataset, row: int) -> NDArray[np.bool_]:
        mask = np.array(dataset.loss_mask(row))
        mask[:1] = False  # no hidden state is before it
        return mask
