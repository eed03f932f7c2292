"""Attention over a row whose tokens are divided over the ranks of a sequence-parallel group: every
rank gets all tokens of a part of the heads, and gives back its own tokens of all heads.

Shapes: S ranks of the group, T tokens of the row, t = T / S tokens of one rank, H heads, G heads of
keys and values, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pocl_ds.errors import ModelError
from pocl_ds.runtime import sequence_parallel


def check_heads(config: Any, size: int) -> None:
    """Raise ModelError if the attention heads of a model cannot be divided over `size` ranks."""
    heads = config.get_text_config(decoder=True).num_attention_heads
    if heads % size:
        sizes = [str(number) for number in range(1, heads + 1) if heads % number == 0]
        raise ModelError(
            f"train.sequence_parallel_size={size} divides attention heads over the ranks of a "
            f"group, and the {config.model_type} model has {heads}: set it to one of "
            f"{', '.join(sizes)}"
        )


def gather_tokens(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of this rank's part of the heads: [1, H / S, T, d], and of keys and values the
    heads that these queries use.

    query: [1, H, t, d]; key, value: [1, G, t, d].
    """
    size, heads = sequence_parallel.size(), query.shape[1]
    copies = key_copies(heads, key.shape[1], size)
    if copies > 1:
        key, value = (side.repeat_interleave(copies, dim=1) for side in (key, value))

    # One exchange for all three: each rank gets its heads of queries, keys and values.
    sides = [side[0].unflatten(0, (size, -1)) for side in (query, key, value)]
    counts = [side.shape[1] for side in sides]
    received = sequence_parallel.exchange(torch.cat(sides, dim=1))  # [S, heads, t, d]
    rows = received.transpose(0, 1).flatten(1, 2)[None]  # [1, heads, T, d]
    query, key, value = rows.split(counts, dim=1)
    return query, key, value


def scatter_tokens(output: Tensor) -> Tensor:
    """This rank's tokens of all heads [1, t, H, d], of all tokens of its own heads
    [1, T, H / S, d].
    """
    size = sequence_parallel.size()
    received = sequence_parallel.exchange(output[0].unflatten(0, (size, -1)))  # [S, t, H / S, d]
    return received.transpose(0, 1).flatten(1, 2)[None]


def key_copies(heads: int, groups: int, size: int) -> int:
    """How often each head of keys and values is repeated, so that every rank gets those that its
    queries use: as seldom as possible. `size` divides `heads`.
    """
    per_group = heads // groups
    return next(
        copies
        for copies in range(1, per_group + 1)
        if per_group % copies == 0 and groups * copies % size == 0
    )
