"""A global batch dealt to ranks in micro-batches: which samples go through one forward together.

Pure functions of lengths: every rank computes the whole deal and takes its part. All ranks get as
many micro-batches, or ZeRO-3 would hang.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Deal = list[list[NDArray[np.int64]]]  # [rank][micro] -> indices into the batch


def deal(
    lengths: NDArray[np.int64],
    *,
    ranks: int,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    packed: bool,
) -> Deal:
    """A batch in micro-batches of at most `micro_batch_tokens` tokens, or where that is None of
    `micro_batch_size` samples.
    """
    if micro_batch_tokens is None:
        return share(lengths, ranks=ranks, micro_batch_size=micro_batch_size)
    return share_by_tokens(lengths, ranks=ranks, tokens=micro_batch_tokens, packed=packed)


def share(lengths: NDArray[np.int64], *, ranks: int, micro_batch_size: int) -> Deal:
    """Micro-batches of `micro_batch_size` samples.

    lengths: tokens of each sample of the batch. Samples of like length come into the same
    micro-step of all ranks, so that little is padded and ranks finish together; the longest go
    first, where too little memory shows at once. The batch must be a multiple of ranks *
    micro_batch_size, so that all ranks have as many micro-batches.
    """
    if len(lengths) % (ranks * micro_batch_size):
        raise ValueError(
            f"a batch of {len(lengths)} cannot be dealt to {ranks} ranks in micro-batches of "
            f"{micro_batch_size}"
        )
    by_length = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    steps = by_length.reshape(-1, micro_batch_size, ranks)
    return [[micro[:, rank] for micro in steps] for rank in range(ranks)]


def share_by_tokens(lengths: NDArray[np.int64], *, ranks: int, tokens: int, packed: bool) -> Deal:
    """Micro-batches of at most `tokens` tokens (padded ones count where padding is), as few a rank
    as can be found.

    A rank may get a micro-batch without a sample, where there are fewer samples than places. The
    largest micro-batches go first, and those of one micro-step are of like size. A sample longer
    than `tokens` raises ValueError.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > tokens:
        raise ValueError(
            f"a sample of {int(sizes.max())} tokens does not fit into a micro-batch of {tokens}"
        )
    by_length = np.argsort(-sizes, kind="stable")
    groups = (
        _packed_groups(sizes, by_length, ranks, tokens)
        if packed
        else _padded_groups(sizes, by_length, ranks, tokens)
    )
    cost = [int(sizes[g].sum() if packed else len(g) * sizes[g].max(initial=0)) for g in groups]
    order = sorted(range(len(groups)), key=lambda i: (-cost[i], i))
    return [[groups[i] for i in order[rank::ranks]] for rank in range(ranks)]


def _packed_groups(
    sizes: NDArray[np.int64], by_length: NDArray[np.int64], ranks: int, tokens: int
) -> list[NDArray[np.int64]]:
    """Longest first into the emptiest of k groups; k is the least multiple of the ranks with which
    all fit.
    """
    count = max(ranks, -(-int(sizes.sum()) // (tokens * ranks)) * ranks)
    while True:
        groups: list[list[int]] = [[] for _ in range(count)]
        filled = np.zeros(count, np.int64)
        for i in by_length:
            place = int(filled.argmin())
            groups[place].append(int(i))
            filled[place] += sizes[i]
        if filled.max() <= tokens:
            return [np.array(group, np.int64) for group in groups]
        count += ranks


def _padded_groups(
    sizes: NDArray[np.int64], by_length: NDArray[np.int64], ranks: int, tokens: int
) -> list[NDArray[np.int64]]:
    """Neighbours by length, as many as fit; the largest groups are halved until ranks share them
    evenly.
    """
    groups: list[NDArray[np.int64]] = []
    start = 0
    while start < len(by_length):
        stop = min(len(by_length), start + max(1, tokens // max(1, int(sizes[by_length[start]]))))
        groups.append(by_length[start:stop])
        start = stop
    while len(groups) % ranks or not groups:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]), default=-1)
        if largest < 0 or len(groups[largest]) < 2:
            groups.append(np.empty(0, np.int64))
            continue
        whole = groups.pop(largest)
        groups += [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return groups
