"""Micro-batches: which samples of a global batch go through one forward pass together.

Pure functions of the samples' lengths and costs. Every rank computes the assignment of all ranks
and uses its part. All ranks get equally many micro-batches, since ZeRO-3 would hang otherwise.

The cost of a sample is the arithmetic of its optimizer step. Attention makes it grow faster than
its length, so ranks with equally many tokens may still wait for each other: with ZeRO-3 in every
micro-step, where all ranks take part in gathering each layer, and otherwise once a step. Costs are
integers, since all machines must compute equal sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
MicroBatches = list[list[Integers]]  # [rank][micro-batch] -> indices into the batch
MicroStep = list[Integers]  # indices of the micro-batch of each rank


def assign_micro_batches(
    lengths: Integers,
    *,
    ranks: int,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    packed: bool,
    costs: Integers | None = None,
) -> MicroBatches:
    """Divide a batch into micro-batches of at most `micro_batch_tokens` tokens, or of
    `micro_batch_size` samples if that is None.

    costs: of each sample in any unit, [samples]; by default its tokens.
    """
    if micro_batch_tokens is None:
        return assign_by_count(
            lengths, ranks=ranks, micro_batch_size=micro_batch_size, packed=packed, costs=costs
        )
    return assign_by_tokens(
        lengths, ranks=ranks, max_tokens=micro_batch_tokens, packed=packed, costs=costs
    )


def assign_by_count(
    lengths: Integers,
    *,
    ranks: int,
    micro_batch_size: int,
    packed: bool,
    costs: Integers | None = None,
) -> MicroBatches:
    """Divide a batch into micro-batches of `micro_batch_size` samples.

    Samples of similar length go into the same micro-step of all ranks, so that there is little
    padding and ranks finish together. The longest go first, so that running out of memory shows
    immediately.

    Args:
        lengths: tokens of each sample of the batch, [samples].
        packed: micro-batches are packed into one row, without padding.
        costs: of each sample in any unit, [samples]; by default its tokens.

    Raises:
        ValueError: the batch is not a multiple of ranks * micro_batch_size.
    """
    if len(lengths) % (ranks * micro_batch_size):
        raise ValueError(
            f"a batch of {len(lengths)} samples cannot be divided into micro-batches of "
            f"{micro_batch_size} on {ranks} ranks"
        )
    sizes, costs = _as_integers(lengths, costs)
    return _deal_to_ranks(
        _steps_by_count(sizes, costs, ranks, micro_batch_size), costs, ranks, packed
    )


def assign_by_tokens(
    lengths: Integers,
    *,
    ranks: int,
    max_tokens: int,
    packed: bool,
    costs: Integers | None = None,
) -> MicroBatches:
    """Divide a batch into few micro-batches of at most `max_tokens` tokens, padding included.

    A rank may get empty micro-batches, if there are fewer samples than ranks. The costliest
    micro-batches go first, and those of one micro-step have similar costs.

    Args:
        lengths: tokens of each sample of the batch, [samples].
        packed: micro-batches are packed into one row, without padding.
        costs: of each sample in any unit, [samples]; by default its tokens.

    Raises:
        ValueError: a sample is longer than `max_tokens`.
    """
    sizes, costs = _as_integers(lengths, costs)
    return _deal_to_ranks(
        _steps_by_tokens(sizes, costs, ranks, max_tokens, packed), costs, ranks, packed
    )


def assign_by_teacher(
    lengths: Integers,
    teachers: Integers,
    *,
    ranks: int,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    packed: bool,
    costs: Integers | None = None,
) -> tuple[MicroBatches, list[int]]:
    """Divide a batch whose samples have several teachers into micro-batches of one teacher each.

    All ranks run the same teacher in the same micro-step. A rank may get empty micro-batches, if
    the samples of a teacher do not fill a micro-step. The teachers come in ascending order; each
    one's samples are divided as `assign_micro_batches` divides a batch, except that with
    `micro_batch_size` their number need not be a multiple of anything.

    Args:
        lengths: tokens of each sample of the batch, [samples].
        teachers: number of the teacher of each sample, [samples].
        costs: of each sample in any unit, [samples]; by default its tokens.

    Returns:
        The assignment, and the teacher of each micro-step.

    Raises:
        ValueError: a sample is longer than `micro_batch_tokens`.
    """
    sizes, costs = _as_integers(lengths, costs)
    steps: list[MicroStep] = []
    teacher_of_step: list[int] = []
    for teacher in np.unique(teachers).tolist():
        own = np.flatnonzero(teachers == teacher)
        if micro_batch_tokens is None:
            part = _steps_by_count(sizes[own], costs[own], ranks, micro_batch_size)
        else:
            part = _steps_by_tokens(sizes[own], costs[own], ranks, micro_batch_tokens, packed)
        steps += [[own[members] for members in step] for step in part]
        teacher_of_step += [int(teacher)] * len(part)
    return _deal_to_ranks(steps, costs, ranks, packed), teacher_of_step


def load_imbalance(assignment: MicroBatches, costs: Integers, *, packed: bool) -> float:
    """How much longer the ranks compute than if all had the same: the cost of the costliest
    micro-batch of each micro-step, summed, over the mean cost of a rank. 1 is balanced.

    costs: of each sample, [samples].
    """
    table = [[_cost(members, costs, packed) for members in of_rank] for of_rank in assignment]
    mean = sum(map(sum, table)) / len(table)
    return sum(map(max, zip(*table, strict=True))) / mean if mean else 1.0


def token_budget_batches(
    lengths: Sequence[int] | Integers, *, max_tokens: int, max_samples: int | None = None
) -> list[Integers]:
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
    batches: list[Integers] = []
    start = 0
    while start < len(longest_first):
        longest = max(1, int(sizes[longest_first[start]]))
        count = max(1, max_tokens // longest)
        if max_samples is not None:
            count = min(count, max_samples)
        batches.append(longest_first[start : start + count])
        start += count
    return batches


def _as_integers(lengths: Integers, costs: Integers | None) -> tuple[Integers, Integers]:
    sizes = np.asarray(lengths, np.int64)
    return sizes, sizes if costs is None else np.asarray(costs, np.int64)


def _cost(members: Integers, costs: Integers, packed: bool) -> int:
    """The cost of a micro-batch. Padding makes all of its samples cost as much as the costliest."""
    own = costs[members]
    return int(own.sum()) if packed else len(own) * int(own.max(initial=0))


def _deal_to_ranks(
    steps: list[MicroStep], costs: Integers, ranks: int, packed: bool
) -> MicroBatches:
    """Give the micro-batches of each micro-step to the ranks: the costliest to the rank whose
    earlier ones cost least.
    """
    assignment: MicroBatches = [[] for _ in range(ranks)]
    totals = np.zeros(ranks, np.int64)
    for step in steps:
        step_costs = np.array([_cost(members, costs, packed) for members in step], np.int64)
        costliest_first = np.argsort(-step_costs, kind="stable")
        receivers = np.argsort(totals, kind="stable")
        for rank, place in zip(receivers, costliest_first, strict=True):
            assignment[rank].append(step[place])
        totals[receivers] += step_costs[costliest_first]
    return assignment


def _steps_by_count(
    sizes: Integers, costs: Integers, ranks: int, micro_batch_size: int
) -> list[MicroStep]:
    """Micro-steps of `ranks * micro_batch_size` samples, the longest first; the last one takes what
    is left, spread over the ranks.

    Of each `ranks` samples in the order of length every rank gets one: the costliest goes to the
    rank that has the least of the micro-step.
    """
    longest_first = np.argsort(-sizes, kind="stable")
    steps = []
    for first in range(0, len(sizes), ranks * micro_batch_size):
        members = longest_first[first : first + ranks * micro_batch_size]
        step: list[list[int]] = [[] for _ in range(ranks)]
        loads = np.zeros(ranks, np.int64)
        for start in range(0, len(members), ranks):
            row = members[start : start + ranks]
            row = row[np.argsort(-costs[row], kind="stable")]
            receivers = np.argsort(loads, kind="stable")[: len(row)]
            for rank, sample in zip(receivers, row, strict=True):
                step[rank].append(int(sample))
            loads[receivers] += costs[row]
        steps.append([np.array(group, np.int64) for group in step])
    return steps


def _steps_by_tokens(
    sizes: Integers, costs: Integers, ranks: int, max_tokens: int, packed: bool
) -> list[MicroStep]:
    """Micro-steps of micro-batches with at most `max_tokens` tokens, the costliest first.

    Raises ValueError for a sample that is longer.
    """
    if len(sizes) and sizes.max() > max_tokens:
        raise ValueError(
            f"a sample of {int(sizes.max())} tokens does not fit into a micro-batch of {max_tokens}"
        )
    if packed:
        groups = _packed_groups(sizes, costs, ranks, max_tokens)
    else:
        groups = _padded_groups(sizes, ranks, max_tokens)
    group_costs = np.array([_cost(group, costs, packed) for group in groups], np.int64)
    # Of all ways to divide the groups into micro-steps, this one has the least sum of maxima.
    ordered = [groups[place] for place in np.argsort(-group_costs, kind="stable")]
    return [ordered[first : first + ranks] for first in range(0, len(ordered), ranks)]


def _packed_groups(sizes: Integers, costs: Integers, ranks: int, max_tokens: int) -> list[Integers]:
    """Put each sample, longest first, into the group of least cost that has room for it.

    The number of groups is the smallest multiple of the ranks with which all samples find room.
    Groups of equal cost may leave no room for the last samples, and groups of equal tokens may cost
    less where room is scarce: both are made, and the ranks get those with which they wait less.
    """
    count = max(ranks, -(-int(sizes.sum()) // (max_tokens * ranks)) * ranks)
    while True:
        choices = []
        for loads in (costs, sizes):
            groups = _fill_groups(sizes, loads, count, max_tokens)
            if groups is not None:
                group_costs = np.array([costs[group].sum() for group in groups], np.int64)
                choices.append((int(np.sort(group_costs)[::-1][::ranks].sum()), groups))
        if choices:
            return min(choices, key=lambda choice: choice[0])[1]
        count += ranks


def _fill_groups(
    sizes: Integers, loads: Integers, count: int, max_tokens: int
) -> list[Integers] | None:
    """Put each sample, longest first, into the group of least load that has room for it; None if
    one finds no room.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    room, totals = np.full(count, max_tokens, np.int64), np.zeros(count, np.int64)
    full = np.iinfo(np.int64).max
    for sample in np.argsort(-sizes, kind="stable"):
        group = int(np.where(room >= sizes[sample], totals, full).argmin())
        if room[group] < sizes[sample]:
            return None
        groups[group].append(int(sample))
        room[group] -= sizes[sample]
        totals[group] += loads[sample]
    return [np.array(group, np.int64) for group in groups]


def _padded_groups(sizes: Integers, ranks: int, max_tokens: int) -> list[Integers]:
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
