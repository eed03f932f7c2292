"""The sampler is a pure function of plan, seed and step."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pocl_ds.curriculum import sampler as sampler_module
from pocl_ds.curriculum.micro_batches import assign_by_count
from pocl_ds.curriculum.plan import Plan, build_plan, single_stage_plan
from pocl_ds.curriculum.sampler import Sampler, permutation

MASK = (1 << 64) - 1


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    subsets, batch, drop_last = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 12)),
        draw(st.booleans()),
    )
    total = draw(st.integers(subsets * (batch if drop_last else 1), 120))
    return build_plan(
        np.arange(total),
        num_subsets=subsets,
        epochs_per_stage=draw(st.integers(1, 3)),
        batch_size=batch,
        drop_last=drop_last,
        scheduler=draw(st.sampled_from(["baby_step", "one_pass", "all_samples"])),
    )


def _plain_permutation(size: int, seed: int, stage: int, epoch: int) -> list[int]:
    """The definition in Python's integers."""

    def mix(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        return value ^ (value >> 31)

    base = 0
    for word in (seed, stage, epoch):
        base = mix((base + word + 0x9E3779B97F4A7C15) & MASK)
    bits = max(size - 1, 0).bit_length()
    return sorted(range(size), key=lambda i: (mix((i + base) & MASK) >> bits, i))


@given(st.integers(0, 300), st.integers(0, MASK), st.integers(0, 9), st.integers(0, 99))
def test_permutation_equals_its_definition(size: int, seed: int, stage: int, epoch: int) -> None:
    actual = permutation(size, seed=seed, stage=stage, epoch=epoch)
    assert actual.dtype == np.int64
    assert actual.tolist() == _plain_permutation(size, seed, stage, epoch)


def test_permutation_is_pinned() -> None:
    """Checkpoints depend on these numbers, so they are part of the format."""
    assert permutation(12, seed=42, stage=1, epoch=3).tolist() == [
        8,
        5,
        0,
        1,
        7,
        4,
        9,
        10,
        11,
        3,
        6,
        2,
    ]


def test_permutations_differ_by_seed_stage_and_epoch_and_mix_well() -> None:
    permutations = {
        permutation(50, seed=a, stage=b, epoch=c).tobytes()
        for a in range(4)
        for b in range(4)
        for c in range(4)
    }
    assert len(permutations) == 64
    first_samples = Counter(int(permutation(8, seed=0, stage=0, epoch=e)[0]) for e in range(8000))
    assert (
        sum((count - 1000) ** 2 / 1000 for count in first_samples.values()) < 30
    )  # chi square of 7 degrees: p = 1e-4


@given(plans(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_epoch_visits_samples_equally_often(plan: Plan, seed: int) -> None:
    sampler, step = Sampler(plan, seed), 0
    for stage in plan.stages:
        for epoch in range(stage.epochs):
            visited: list[int] = []
            for _ in range(stage.steps_per_epoch):
                batch = sampler.batch(step)
                assert len(batch) == plan.batch_size
                assert (sampler.position(step).stage, sampler.position(step).epoch) == (
                    stage.index,
                    epoch,
                )
                visited += batch.tolist()
                step += 1
            stage_rows = set(range(stage.start, stage.stop))
            assert set(visited) <= stage_rows
            if plan.drop_last:  # at most once, and fewer than a batch is missing
                assert len(set(visited)) == len(visited) > stage.num_samples - plan.batch_size
            else:  # all at least once, and the repeated ones evenly
                counts = Counter(visited)
                assert set(counts) == stage_rows
                assert max(counts.values()) - min(counts.values()) <= 1
    assert step == plan.total_steps


@given(plans(), st.integers(0, 1000), st.data())
@settings(max_examples=60, deadline=None)
def test_batches_after_a_resume_equal_those_without(
    plan: Plan, seed: int, data: st.DataObject
) -> None:
    uninterrupted = Sampler(plan, seed)
    batches = [uninterrupted.batch(step).tolist() for step in range(plan.total_steps)]
    for _ in range(3):  # the second and third also resume within an epoch
        start = data.draw(st.integers(0, plan.total_steps - 1))
        resumed = Sampler(plan, seed)
        stop = min(start + 5, plan.total_steps)
        assert [resumed.batch(step).tolist() for step in range(start, stop)] == batches[start:stop]
    backwards = Sampler(plan, seed)
    assert [
        backwards.batch(step).tolist() for step in reversed(range(plan.total_steps))
    ] == batches[::-1]


def test_positions_of_steps() -> None:
    plan = build_plan(np.arange(40), num_subsets=2, epochs_per_stage=2, batch_size=10)
    sampler = Sampler(plan, 0)
    actual = [
        (p.stage, p.epoch, p.step_in_stage) for p in map(sampler.position, range(plan.total_steps))
    ]
    assert actual == [(0, 0, 0), (0, 0, 1), (0, 1, 2), (0, 1, 3)] + [
        (1, i // 4, i) for i in range(8)
    ]
    for step in (-1, plan.total_steps, plan.total_steps + 1):
        with pytest.raises(IndexError, match=f"step {step} is outside the plan's 12 steps"):
            sampler.position(step)


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shuffle of a large data set takes longer than a step."""
    shuffles: list[tuple[int, int]] = []

    def counting_permutation(size: int, *, seed: int, stage: int, epoch: int) -> Any:
        shuffles.append((stage, epoch))
        return permutation(size, seed=seed, stage=stage, epoch=epoch)

    monkeypatch.setattr(sampler_module, "permutation", counting_permutation)
    plan = build_plan(np.arange(40), num_subsets=2, epochs_per_stage=2, batch_size=5)
    sampler = Sampler(plan, 0)
    for step in range(plan.total_steps):
        sampler.batch(step)
    assert shuffles == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_single_stage_is_cut_within_its_last_epoch() -> None:
    plan = single_stage_plan(np.arange(30), steps=5, batch_size=10, temperature=1, sft_ratio=0)
    sampler = Sampler(plan, 7)
    visits = Counter(int(i) for step in range(5) for i in sampler.batch(step))
    assert set(visits.values()) == {1, 2} and sum(visits.values()) == 50


def test_order_may_be_memory_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "order.npy", np.arange(100)[::-1])
    order = np.load(tmp_path / "order.npy", mmap_mode="r")
    sampler = Sampler(build_plan(order, num_subsets=2, batch_size=8), 1)
    assert set(sampler.batch(0).tolist()) <= set(range(50, 100))  # the first half of the order


@given(plans(), st.integers(2, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_samples_stay_within_their_window(plan: Plan, window: int, data: st.DataObject) -> None:
    """Each window holds the same samples as without it, and each of its batches holds consecutive
    samples by length.
    """
    total = len(plan.stages[-1].order)
    lengths = np.array(
        data.draw(st.lists(st.integers(1, 9), min_size=total, max_size=total)), np.int64
    )
    plain, windowed = Sampler(plan, 3), Sampler(plan, 3, lengths=lengths, window=window)
    start = 0
    for stage in plan.stages:
        for epoch in range(min(stage.epochs, 2)):
            for offset in range(0, stage.steps_per_epoch, window):
                begin = start + epoch * stage.steps_per_epoch
                steps = range(begin + offset, begin + min(offset + window, stage.steps_per_epoch))
                before = np.concatenate([plain.batch(step) for step in steps])
                after = [windowed.batch(step) for step in steps]
                assert sorted(np.concatenate(after)) == sorted(before)
                edges = sorted((lengths[batch].min(), lengths[batch].max()) for batch in after)
                assert all(high <= low for (_, high), (low, _) in itertools.pairwise(edges))
        start += stage.steps


def test_batches_of_a_window_come_in_another_order_each_time() -> None:
    plan = single_stage_plan(np.arange(64), steps=80, batch_size=8, temperature=1.0, sft_ratio=0.0)
    sampler = Sampler(plan, 0, lengths=np.arange(64), window=8)
    first_batches = {int(sampler.batch(epoch * 8).min()) // 8 for epoch in range(10)}
    assert len(first_batches) > 3


def test_window_of_one_changes_nothing() -> None:
    plan, lengths = (
        single_stage_plan(np.arange(64), steps=16, batch_size=8, temperature=1.0, sft_ratio=0.0),
        np.arange(64),
    )
    plain = [Sampler(plan, 5).batch(step).tolist() for step in range(16)]
    assert [Sampler(plan, 5, lengths=lengths).batch(step).tolist() for step in range(16)] == plain


def test_batches_of_a_window_are_pinned() -> None:
    """The order of a window's batches is part of the format too."""
    plan = single_stage_plan(np.arange(12), steps=12, batch_size=2, temperature=1.0, sft_ratio=0.0)
    sampler = Sampler(plan, 3, lengths=np.arange(12), window=4)
    assert [sampler.batch(step).tolist() for step in range(12)] == [
        [1, 2],
        [8, 9],
        [6, 7],
        [4, 5],
        [0, 3],
        [10, 11],
        [10, 11],
        [7, 9],
        [5, 6],
        [3, 4],
        [2, 8],
        [0, 1],
    ]


def test_a_window_needs_lengths() -> None:
    with pytest.raises(ValueError, match="needs the lengths"):
        Sampler(
            single_stage_plan(np.arange(8), steps=1, batch_size=8, temperature=1.0, sft_ratio=0.0),
            0,
            window=2,
        )


@given(plans(), st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)]))
@settings(max_examples=40, deadline=None)
def test_global_batch_does_not_depend_on_ranks(plan: Plan, layout: tuple[int, int]) -> None:
    ranks, micro = layout
    assume(plan.batch_size % (ranks * micro) == 0)
    sampler = Sampler(plan, 3)
    for step in range(0, plan.total_steps, 5):
        batch = sampler.batch(step)
        assigned = assign_by_count(batch % 7, ranks=ranks, micro_batch_size=micro, packed=False)
        assert sorted(
            np.concatenate([batch[part] for rank_batches in assigned for part in rank_batches])
        ) == sorted(batch)
