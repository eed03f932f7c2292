"""Micro-batches: which samples of a global batch go through one forward pass together.

Pure functions of sample lengths. Every rank computes the assignment of all ranks and uses its part.
All ranks get equally many micro-batches, since ZeRO-3 would hang otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MicroBatches = list[list[NDArray[np.int64]]]  # [rank][micro-batch] -> indices into the batch


def assign_micro_batches(
    lengths: NDArray[np.int64],
    *,
    ranks: int,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    packed: bool,
) -> MicroBatches:
    """Divide a batch into micro-batches of at most `micro_batch_tokens` tokens, or of
    `micro_batch_size` samples if that is None.
    """
    if micro_batch_tokens is None:
        return assign_by_count(lengths, ranks=ranks, micro_batch_size=micro_batch_size)
    return assign_by_tokens(lengths, ranks=ranks, max_tokens=micro_batch_tokens, packed=packed)


def assign_by_count(
    lengths: NDArray[np.int64], *, ranks: int, micro_batch_size: int
) -> MicroBatches:
    """Divide a batch into micro-batches of `micro_batch_size` samples.

    Samples of similar length go into the same micro-step of all ranks, so that there is little
    padding and ranks finish together. The longest go first, so that running out of memory shows
    immediately.

    Args:
        lengths: tokens of each sample of the batch, [samples].

    Raises:
        ValueError: the batch is not a multiple of ranks * micro_batch_size.
    """
    if len(lengths) % (ranks * micro_batch_size):
        raise ValueError(
            f"a batch of {len(lengths)} samples cannot be divided into micro-batches of "
            f"{micro_batch_size} on {ranks} ranks"
        )
    longest_first = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    micro_steps = longest_first.reshape(-1, micro_batch_size, ranks)
    return [[micro_step[:, rank] for micro_step in micro_steps] for rank in range(ranks)]


def assign_by_tokens(
    lengths: NDArray[np.int64], *, ranks: int, max_tokens: int, packed: bool
) -> MicroBatches:
    """Divide a batch into few micro-batches of at most `max_tokens` tokens, padding included.

    A rank may get empty micro-batches, if there are fewer samples than ranks. The largest
    micro-batches go first, and those of one micro-step have similar sizes.

    Args:
        lengths: tokens of each sample of the batch, [samples].
        packed: micro-batches are packed into one row, without padding.

    Raises:
        ValueError: a sample is longer than `max_tokens`.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > max_tokens:
        raise ValueError(
            f"a sample of {int(sizes.max())} tokens does not fit into a micro-batch of {max_tokens}"
        )
    build_groups = _packed_groups if packed else _padded_groups
    groups = build_groups(sizes, ranks, max_tokens)
    tokens = [int(sizes[g].sum() if packed else len(g) * sizes[g].max(initial=0)) for g in groups]
    largest_first = sorted(range(len(groups)), key=lambda i: (-tokens[i], i))
    return [[groups[i] for i in largest_first[rank::ranks]] for rank in range(ranks)]


def assign_by_teacher(
    lengths: NDArray[np.int64],
    teachers: NDArray[np.int64],
    *,
    ranks: int,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    packed: bool,
) -> tuple[MicroBatches, list[int]]:
    """Divide a batch whose samples have several teachers into micro-batches of one teacher each.

    All ranks run the same teacher in the same micro-step. A rank may get empty micro-batches, if
    the samples of a teacher do not fill a micro-step. The teachers come in ascending order; each
    one's samples are divided as `assign_micro_batches` divides a batch, except that with
    `micro_batch_size` their number need not be a multiple of anything.

    Args:
        lengths: tokens of each sample of the batch, [samples].
        teachers: number of the teacher of each sample, [samples].

    Returns:
        The assignment, and the teacher of each micro-step.

    Raises:
        ValueError: a sample is longer than `micro_batch_tokens`.
    """
    assignment: MicroBatches = [[] for _ in range(ranks)]
    teacher_of_step: list[int] = []
    for teacher in np.unique(teachers).tolist():
        own = np.flatnonzero(teachers == teacher)
        if micro_batch_tokens is None:
            steps = _fill_by_count(lengths[own], ranks, micro_batch_size)
        else:
            steps = assign_by_tokens(
                lengths[own], ranks=ranks, max_tokens=micro_batch_tokens, packed=packed
            )
        for rank, micro_batches in enumerate(steps):
            assignment[rank] += [own[members] for members in micro_batches]
        teacher_of_step += [int(teacher)] * len(steps[0])
    return assignment, teacher_of_step


def _fill_by_count(lengths: NDArray[np.int64], ranks: int, micro_batch_size: int) -> MicroBatches:
    """`assign_by_count` for any number of samples: the last micro-step takes what is left, spread
    over the ranks.
    """
    longest_first = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    places = -(-len(longest_first) // (ranks * micro_batch_size)) * ranks * micro_batch_size
    filled = np.concatenate([longest_first, np.full(places - len(longest_first), -1, np.int64)])
    micro_steps = filled.reshape(-1, micro_batch_size, ranks)
    return [[members[members >= 0] for members in micro_steps[:, :, rank]] for rank in range(ranks)]


def token_budget_batches(
    lengths: Sequence[int] | NDArray[np.int64], *, max_tokens: int, max_samples: int | None = None
) -> list[NDArray[np.int64]]:
    """Group samples of similar length into batches of at most `max_tokens` tokens with padding.

    The longest samples come first. A sample longer than `max_tokens` gets its own batch.

    Args:
        lengths: tokens of each sample, [samples].
        max_samples: most samples in a batch, None for no limit.

    Returns:
        Indices of the samples of each batch.
    """
    sizes = np.asarray(lengths, np.int64)
    longest_first = np.argsort(-sizes, kind="stable")
    batches: list[NDArray[np.int64]] = []
    start = 0
    while start < len(longest_first):
        longest = max(1, int(sizes[longest_first[start]]))
        count = max(1, max_tokens // longest)
        if max_samples is not None:
            count = min(count, max_samples)
        batches.append(longest_first[start : start + count])
        start += count
    return batches


def _packed_groups(
    sizes: NDArray[np.int64], ranks: int, max_tokens: int
) -> list[NDArray[np.int64]]:
    """Put each sample, longest first, into the emptiest of k groups.

    k is the smallest multiple of the ranks with which every group fits into the budget.
    """
    longest_first = np.argsort(-sizes, kind="stable")
    count = max(ranks, -(-int(sizes.sum()) // (max_tokens * ranks)) * ranks)
    while True:
        groups: list[list[int]] = [[] for _ in range(count)]
        tokens = np.zeros(count, np.int64)
        for i in longest_first:
            emptiest = int(tokens.argmin())
            groups[emptiest].append(int(i))
            tokens[emptiest] += sizes[i]
        if tokens.max() <= max_tokens:
            return [np.array(group, np.int64) for group in groups]
        count += ranks


def _padded_groups(
    sizes: NDArray[np.int64], ranks: int, max_tokens: int
) -> list[NDArray[np.int64]]:
    """Batches of similar lengths; the largest are halved until all ranks get equally many."""
    groups = token_budget_batches(sizes, max_tokens=max_tokens)
    while len(groups) % ranks or not groups:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]), default=-1)
        if largest < 0 or len(groups[largest]) < 2:
            groups.append(np.empty(0, np.int64))
            continue
        group = groups.pop(largest)
        groups += [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups
