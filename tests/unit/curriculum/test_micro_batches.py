"""Micro-batches: every sample once, equally many for each rank, within the budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pocl_ds.curriculum.micro_batches import (
    assign_by_count,
    assign_by_teacher,
    assign_by_tokens,
    assign_micro_batches,
    load_imbalance,
    token_budget_batches,
)

Integers = NDArray[np.int64]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.data())
def test_micro_batches_cover_the_batch(
    ranks: int, micro: int, count: int, data: st.DataObject
) -> None:
    size = ranks * micro * count
    lengths = np.array(
        data.draw(st.lists(st.integers(1, 9), min_size=size, max_size=size)), np.int64
    )
    assigned = assign_by_count(lengths, ranks=ranks, micro_batch_size=micro, packed=True)
    assert [len(rank_batches) for rank_batches in assigned] == [count] * ranks
    assert all(
        len(micro_batch) == micro for rank_batches in assigned for micro_batch in rank_batches
    )
    assert sorted(
        int(i) for rank_batches in assigned for micro_batch in rank_batches for i in micro_batch
    ) == list(range(size))
    for m in range(count):  # similar lengths together: no micro-step is longer than the one before
        step = [
            lengths[micro_batch] for micro_batch in (rank_batches[m] for rank_batches in assigned)
        ]
        if m + 1 < count:
            assert min(map(np.min, step)) >= max(
                np.max(lengths[rank_batches[m + 1]]) for rank_batches in assigned
            )
        # the ranks' longest samples are the longest of the micro-step
        assert sorted(map(np.max, step)) == sorted(np.concatenate(step))[-ranks:]


@given(
    st.lists(st.integers(1, 20), max_size=40), st.integers(1, 4), st.integers(20, 60), st.booleans()
)
def test_micro_batches_respect_the_token_budget(
    lengths: list[int], ranks: int, tokens: int, packed: bool
) -> None:
    sizes = np.array(lengths, np.int64)
    assigned = assign_by_tokens(sizes, ranks=ranks, max_tokens=tokens, packed=packed)
    assert (
        len(assigned) == ranks
        and len({len(rank_batches) for rank_batches in assigned}) == 1
        and assigned[0]
    )
    assert sorted(
        int(i) for rank_batches in assigned for micro_batch in rank_batches for i in micro_batch
    ) == list(range(len(lengths)))
    cost = [
        [int(sizes[p].sum() if packed else len(p) * sizes[p].max(initial=0)) for p in rank_batches]
        for rank_batches in assigned
    ]
    assert max(max(rank_batches) for rank_batches in cost) <= tokens
    for m in range(len(assigned[0]) - 1):  # the largest first
        assert min(rank_batches[m] for rank_batches in cost) >= max(
            rank_batches[m + 1] for rank_batches in cost
        )
    counts = [len(micro_batch) for rank_batches in assigned for micro_batch in rank_batches]
    assert min(counts) > 0 or max(counts) < 2  # no rank is idle while another has several samples
    # never more than twice the minimum: two groups of the longest-first rule cannot both be
    # half empty
    if packed:
        assert len(assigned[0]) <= 2 * -(-int(sizes.sum()) // (tokens * ranks)) + 1


def test_samples_of_one_length_keep_their_order() -> None:
    """Every rank computes the assignment itself, so ties must be broken equally on all machines."""
    sizes = np.random.default_rng(0).integers(1, 4, 64)
    expected = sorted(range(64), key=lambda i: -sizes[i])
    assert (
        assign_by_count(sizes, ranks=1, micro_batch_size=64, packed=True)[0][0].tolist() == expected
    )
    for packed in (False, True):
        assert [
            micro_batch.tolist()
            for micro_batch in assign_by_tokens(sizes, ranks=1, max_tokens=192, packed=packed)[0]
        ] == [expected]


def test_packed_micro_batches_are_balanced() -> None:
    sizes = np.array([9, 8, 7, 6, 5, 4, 3, 2], np.int64)
    assigned = assign_by_tokens(sizes, ranks=2, max_tokens=24, packed=True)
    assert [
        [int(sizes[micro_batch].sum()) for micro_batch in rank_batches] for rank_batches in assigned
    ] == [[22], [22]]
    padded = assign_by_tokens(sizes, ranks=2, max_tokens=24, packed=False)
    assert (
        sum(
            len(micro_batch) * int(sizes[micro_batch].max(initial=0))
            for rank_batches in padded
            for micro_batch in rank_batches
        )
        <= 54
    )


def test_token_budget_takes_precedence_over_the_size() -> None:
    sizes = np.array([5, 5, 1, 1], np.int64)
    by_count = assign_micro_batches(
        sizes, ranks=1, micro_batch_size=2, micro_batch_tokens=None, packed=False
    )
    assert [micro_batch.tolist() for micro_batch in by_count[0]] == [[0, 1], [2, 3]]
    by_tokens = assign_micro_batches(
        sizes, ranks=1, micro_batch_size=2, micro_batch_tokens=5, packed=False
    )
    assert [micro_batch.tolist() for micro_batch in by_tokens[0]] == [[0], [1], [2, 3]]


def test_sample_above_the_budget_is_refused() -> None:
    with pytest.raises(
        ValueError, match="a sample of 9 tokens does not fit into a micro-batch of 8"
    ):
        assign_by_tokens(np.array([9], np.int64), ranks=1, max_tokens=8, packed=True)


def test_uneven_batch_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="a batch of 10 samples cannot be divided into micro-batches of 3 on 2 ranks",
    ):
        assign_by_count(np.ones(10, np.int64), ranks=2, micro_batch_size=3, packed=True)


def test_batches_of_a_token_budget_hold_each_index_once_within_the_limits() -> None:
    lengths = [5, 90, 7, 40, 41, 3, 60]
    batches = token_budget_batches(lengths, max_tokens=100, max_samples=3)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(
        len(batch) <= 3 and len(batch) * max(lengths[i] for i in batch) <= 100 for batch in batches
    )
    alone = token_budget_batches([500], max_tokens=100, max_samples=3)
    assert [batch.tolist() for batch in alone] == [[0]]  # although it exceeds the budget
    assert token_budget_batches([], max_tokens=100) == []


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(1, 5),
    st.none() | st.integers(20, 60),
    st.booleans(),
)
def test_a_micro_step_has_one_teacher_on_all_ranks(
    samples: list[tuple[int, int]], ranks: int, micro: int, tokens: int | None, packed: bool
) -> None:
    lengths, teachers = (np.array(column, np.int64) for column in zip(*samples, strict=True))
    assigned, teacher_of_step = assign_by_teacher(
        lengths,
        teachers,
        ranks=ranks,
        micro_batch_size=micro,
        micro_batch_tokens=tokens,
        packed=packed,
    )
    # Equally many micro-batches on every rank, and every sample once.
    assert [len(of_rank) for of_rank in assigned] == [len(teacher_of_step)] * ranks
    members = [int(i) for of_rank in assigned for micro_batch in of_rank for i in micro_batch]
    assert sorted(members) == list(range(len(samples)))
    # One teacher in each micro-step, whose samples stay within the limit, and no empty micro-step.
    for step, teacher in enumerate(teacher_of_step):
        micro_batches = [of_rank[step] for of_rank in assigned]
        assert sum(map(len, micro_batches)) > 0
        for micro_batch in micro_batches:
            assert (teachers[micro_batch] == teacher).all()
            if tokens is None:
                assert len(micro_batch) <= micro
            else:
                sizes = lengths[micro_batch]
                assert (sizes.sum() if packed else len(sizes) * sizes.max(initial=0)) <= tokens


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.none() | st.just(30), st.data())
def test_a_single_teacher_changes_no_micro_batch(
    ranks: int, micro: int, count: int, tokens: int | None, data: st.DataObject
) -> None:
    size = ranks * micro * count
    lengths = np.array(
        data.draw(st.lists(st.integers(1, 9), min_size=size, max_size=size)), np.int64
    )
    limits: dict[str, Any] = {
        "ranks": ranks,
        "micro_batch_size": micro,
        "micro_batch_tokens": tokens,
        "packed": True,
    }
    plain = assign_micro_batches(lengths, **limits)
    routed, teachers = assign_by_teacher(lengths, np.full(size, 2), **limits)
    assert teachers == [2] * len(plain[0])
    for own, other in zip(plain, routed, strict=True):
        assert [part.tolist() for part in own] == [part.tolist() for part in other]


def quadratic_costs(lengths: Integers, linear: int = 10) -> Integers:
    """Costs of samples whose attention costs as much as the rest at `linear` tokens."""
    return lengths * linear + lengths**2


def by_length_alone(lengths: Integers, ranks: int, micro: int) -> list[list[Integers]]:
    """The rule that costs replaced: rank r gets every `ranks`-th sample from the r-th longest."""
    steps = np.argsort(-lengths, kind="stable").reshape(-1, micro, ranks)
    return [[step[:, rank] for step in steps] for rank in range(ranks)]


def by_tokens_alone(lengths: Integers, ranks: int, max_tokens: int) -> list[list[Integers]]:
    """The rule that costs replaced: each sample, longest first, into the group of least tokens."""
    count = max(ranks, -(-int(lengths.sum()) // (max_tokens * ranks)) * ranks)
    while True:
        groups: list[list[int]] = [[] for _ in range(count)]
        for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            least = min(range(count), key=lambda g: sum(lengths[i] for i in groups[g]))
            groups[least].append(sample)
        tokens = [sum(int(lengths[i]) for i in group) for group in groups]
        if max(tokens) <= max_tokens:
            order = sorted(range(count), key=lambda g: (-tokens[g], g))
            return [[np.array(groups[g], np.int64) for g in order[r::ranks]] for r in range(ranks)]
        count += ranks


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.data())
def test_costs_make_no_rank_wait_longer_with_samples_counted(
    ranks: int, micro: int, count: int, packed: bool, data: st.DataObject
) -> None:
    size = ranks * micro * count
    lengths = np.array(
        data.draw(st.lists(st.integers(1, 60), min_size=size, max_size=size)), np.int64
    )
    costs = quadratic_costs(lengths)
    assigned = assign_by_count(
        lengths, ranks=ranks, micro_batch_size=micro, packed=packed, costs=costs
    )
    before = by_length_alone(lengths, ranks, micro)
    # A micro-step has the samples that it had, dealt to the ranks in another way.
    for step in range(count):
        new, old = ([of_rank[step] for of_rank in choice] for choice in (assigned, before))
        assert {len(members) for members in new} == {micro}
        assert sorted(np.concatenate(new)) == sorted(np.concatenate(old))
    imbalance = load_imbalance(assigned, costs, packed=packed)
    assert 1 <= imbalance <= load_imbalance(before, costs, packed=packed) + 1e-12


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 5), st.integers(60, 150)
)
def test_costs_make_no_rank_wait_longer_with_a_token_budget(
    lengths: list[int], ranks: int, tokens: int
) -> None:
    sizes = np.array(lengths, np.int64)
    costs = quadratic_costs(sizes)
    assigned = assign_by_tokens(sizes, ranks=ranks, max_tokens=tokens, packed=True, costs=costs)
    before = by_tokens_alone(sizes, ranks, tokens)
    members = [int(i) for of_rank in assigned for group in of_rank for i in group]
    assert sorted(members) == list(range(len(sizes)))
    assert all(int(sizes[group].sum()) <= tokens for of_rank in assigned for group in of_rank)
    # Fewer micro-steps, or as many with no more waiting.
    assert len(assigned[0]) <= len(before[0])
    imbalance = load_imbalance(assigned, costs, packed=True)
    if len(assigned[0]) == len(before[0]):
        assert 1 <= imbalance <= load_imbalance(before, costs, packed=True) + 1e-12
    # The ranks' sums differ by no more than one micro-batch of the costliest.
    totals = [sum(int(costs[group].sum()) for group in of_rank) for of_rank in assigned]
    largest = max(int(costs[group].sum()) for of_rank in assigned for group in of_rank)
    assert max(totals) - min(totals) <= largest


@pytest.mark.parametrize(("ranks", "before"), [(2, 1.05), (8, 1.2)])
def test_costs_balance_long_tails(ranks: int, before: float) -> None:
    """16 samples a rank from 100 to 16,000 tokens, in micro-batches of 32,768 tokens."""
    source = np.random.default_rng(0)
    imbalances = []
    for _ in range(8):
        draws = source.lognormal(np.log(2000), 1.0, 16 * ranks)
        lengths = np.clip(draws, 100, 16_000).astype(np.int64)
        costs = quadratic_costs(lengths, linear=8000)
        old = by_tokens_alone(lengths, ranks, 32_768)
        new = assign_by_tokens(lengths, ranks=ranks, max_tokens=32_768, packed=True, costs=costs)
        imbalances.append([load_imbalance(choice, costs, packed=True) for choice in (old, new)])
    old_mean, new_mean = np.mean(imbalances, axis=0)
    assert old_mean > before and new_mean - 1 < (old_mean - 1) / 3


def test_imbalance_by_hand() -> None:
    """Two micro-steps: 6 beside 2, then 1 beside 3. The ranks compute 7 and 5, and wait for 9."""
    costs = np.array([4, 2, 2, 1, 3], np.int64)
    groups = [[np.array([0, 1]), np.array([3])], [np.array([2]), np.array([4])]]
    assert load_imbalance(groups, costs, packed=True) == 9 / 6
    # With padding, the two samples of the first micro-batch cost 4 each.
    assert load_imbalance(groups, costs, packed=False) == 11 / 7
    assert load_imbalance([[np.array([], np.int64)]], costs, packed=True) == 1


def test_ranks_share_a_micro_step_equally() -> None:
    lengths = np.array([4, 3, 2, 1], np.int64)
    assigned = assign_by_count(lengths, ranks=2, micro_batch_size=2, packed=True)
    assert [[group.tolist() for group in groups] for groups in assigned] == [[[0, 3]], [[1, 2]]]


def test_ranks_take_turns_with_the_costliest() -> None:
    lengths = np.array([9, 8, 7, 6, 5, 4, 3, 2], np.int64)
    assigned = assign_by_count(lengths, ranks=2, micro_batch_size=1, packed=False)
    sizes = [[int(lengths[group].sum()) for group in of_rank] for of_rank in assigned]
    assert sizes == [[9, 6, 5, 2], [8, 7, 4, 3]]
