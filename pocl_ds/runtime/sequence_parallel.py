"""Sequence parallelism: groups of neighboring ranks that share their micro-batches. Each rank of a
group has an equal part of a row's tokens, and in attention an equal part of the heads
(DeepSpeed-Ulysses, arXiv 2309.14509).

A group counts as one rank where samples are dealt out, so there are `data_parallel_size` parts of a
global batch. Until `start` every rank is its own group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pocl_ds.runtime import distributed


class _State:
    """The groups of this process."""

    size = 1  # ranks of a group
    group: Any = None  # the process group that this rank is in; None for a single rank


def start(size: int) -> None:
    """Divide the ranks into groups of `size`. All ranks call it together, after the process group
    is initialized. `size` divides the number of ranks.
    """
    if size == _State.size:
        return
    groups = [
        dist.new_group(list(range(first, first + size)))
        for first in range(0, distributed.world_size(), size)
        if size > 1
    ]
    _State.size = size
    _State.group = groups[data_parallel_rank()] if groups else None


def size() -> int:
    """Number of ranks that share a micro-batch."""
    return _State.size


def part() -> int:
    """Which part of a row this rank has, from 0."""
    return distributed.rank() % _State.size


def data_parallel_size() -> int:
    """Number of groups."""
    return distributed.world_size() // _State.size


def data_parallel_rank() -> int:
    """Number of this rank's group."""
    return distributed.rank() // _State.size


def exchange(parts: Tensor) -> Tensor:
    """Send parts[j] to rank j of the group, and receive the part of each rank, in their order.
    Differentiable; all ranks of the group call it together.

    parts: [size, ...], of the same shape on all ranks. Returns a tensor of that shape.
    """
    exchanged: Tensor = _Exchange.apply(parts)
    return exchanged


class _Exchange(torch.autograd.Function):
    """An all-to-all, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        return _all_to_all(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_to_all(gradients[0])


def _all_to_all(parts: Tensor) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=_State.group)
    return received
