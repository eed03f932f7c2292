"""The samples of a packed row, and what attention kernels need to know of them.

Everything is computed on the host, where the lengths are known, and copied to the device without
waiting for it.

Shapes: T tokens of the row, n samples, b blocks of BLOCK tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # tokens per side of a FlexAttention block


@dataclass(frozen=True)
class PackedSamples:
    """The samples of a packed row, by their lengths. Models pass it down to `per_sample`.

    One object belongs to one forward pass, and its properties are made once for all layers.
    """

    lengths: tuple[int, ...]
    device: torch.device
    _block_masks: dict[int | None, BlockMask] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the row: T."""
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(self.lengths)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Where each sample starts in the row, and T: [n + 1] int32."""
        return self._to_device(np.cumsum((0, *self.lengths), dtype=np.int32))

    @cached_property
    def padded_positions(self) -> Tensor:
        """Where each token would be if the samples were padded to the longest: [T] int64."""
        numbers = np.repeat(np.arange(len(self.lengths)), self.lengths)
        columns = np.arange(self.num_tokens) - _first_tokens(self.lengths)
        return self._to_device(numbers * self.longest + columns)

    def block_mask(self, window: int | None) -> BlockMask:
        """FlexAttention's mask: causal within each sample, and within a sliding window if the layer
        has one.

        window: tokens that a token attends to, itself included.
        """
        if window not in self._block_masks:
            self._block_masks[window] = self._make_block_mask(window)
        return self._block_masks[window]

    def _make_block_mask(self, window: int | None) -> BlockMask:
        first_keys = first_visible_keys(self.lengths, window)
        first_key = self._to_device(first_keys.astype(np.int32))

        def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key >= first_key[query])

        partial, full = visible_blocks(first_keys)
        indices = [
            self._to_device(array[None, None])
            for blocks in (partial, full)
            for array in (
                blocks.sum(1, dtype=np.int32),
                np.argsort(~blocks, axis=1, kind="stable").astype(np.int32),
            )
        ]
        total = len(first_keys)
        return BlockMask.from_kv_blocks(
            *indices, BLOCK_SIZE=BLOCK, mask_mod=is_visible, seq_lengths=(total, total)
        )

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def first_visible_keys(lengths: tuple[int, ...], window: int | None) -> NDArray[np.int64]:
    """The first token of the row that each token attends to: [T]. It never decreases."""
    first = _first_tokens(lengths)
    return first if window is None else np.maximum(first, np.arange(len(first)) - window + 1)


def visible_blocks(
    first_keys: NDArray[np.int64],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which blocks of keys the queries of a block attend to in part, and which completely: two
    arrays [b, b] of queries and keys.
    """
    starts = np.arange(0, len(first_keys), BLOCK)
    ends = np.minimum(starts + BLOCK, len(first_keys))
    # The first query of a block sees the earliest key, and its last query the fewest keys.
    earliest, latest = first_keys[starts][:, None], first_keys[ends - 1][:, None]
    numbers = np.arange(len(starts))
    visible = (numbers <= numbers[:, None]) & (ends > earliest)
    full = (numbers < numbers[:, None]) & (starts >= latest)
    return visible & ~full, full


def _first_tokens(lengths: tuple[int, ...]) -> NDArray[np.int64]:
    """For each token, where its sample starts in the row: [T]."""
    sizes = np.asarray(lengths, np.int64)
    return np.repeat(np.cumsum(sizes) - sizes, sizes)
