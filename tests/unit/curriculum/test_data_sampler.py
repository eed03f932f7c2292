"""The sampler of data loaders: the plan's batches on any number of ranks, and its state."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.curriculum import CurriculumSampler, Plan, Sampler, build_plan
from pocl_ds.errors import ArtifactError, RecipeError

BATCH = 12


def make_plan(samples: int = 40, seed: int = 0, **arguments: object) -> Plan:
    order = np.random.default_rng(seed).permutation(samples)
    return build_plan(order, num_subsets=2, epochs_per_stage=2, batch_size=BATCH, **arguments)


def make_sampler(
    plan: Plan, *, ranks: int = 1, micro: int = 2, **arguments: int
) -> CurriculumSampler:
    return CurriculumSampler(plan, 5, micro_batch_size=micro, world_size=ranks, **arguments)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 12), (1, 3), (2, 3), (3, 2), (4, 1)])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_ranks_share_the_batches_of_the_plan(ranks: int, micro: int, with_lengths: bool) -> None:
    plan, lengths = make_plan(), np.arange(40) % 7
    of_ranks = [
        CurriculumSampler(
            plan,
            5,
            micro_batch_size=micro,
            rank=rank,
            world_size=ranks,
            lengths=lengths if with_lengths else None,
        )
        for rank in range(ranks)
    ]
    rows = [np.array(list(sampler)).reshape(plan.total_steps, -1, micro) for sampler in of_ranks]
    assert all(part.size == len(sampler) for part, sampler in zip(rows, of_ranks, strict=True))
    for step in range(plan.total_steps):
        batch = Sampler(plan, 5).batch(step)
        micro_steps = np.stack([part[step] for part in rows])  # [ranks, micro-steps, micro]
        assert sorted(micro_steps.ravel()) == sorted(batch)
        if with_lengths:  # no micro-step has a sample longer than one of the micro-step before
            sizes = lengths[micro_steps].swapaxes(0, 1).reshape(len(micro_steps[0]), -1)
            assert (sizes[1:].max(1) <= sizes[:-1].min(1)).all()
    assert list(of_ranks[0]) == rows[0].ravel().tolist()  # a second pass starts again


@given(drawn=st.integers(0, 120), ranks=st.sampled_from([1, 2, 3]))
def test_a_loaded_state_continues(drawn: int, ranks: int) -> None:
    plan = make_plan()
    whole = list(make_sampler(plan, ranks=ranks, rank=ranks - 1))
    first = make_sampler(plan, ranks=ranks, rank=ranks - 1)
    start = list(itertools.islice(first, drawn))
    second = make_sampler(plan, ranks=ranks, rank=ranks - 1)
    second.load_state_dict(first.state_dict())
    assert start + list(second) == (whole if drawn <= len(whole) else start + whole)


def test_another_number_of_ranks_continues_between_steps() -> None:
    plan = make_plan()
    first = make_sampler(plan, ranks=2)
    list(itertools.islice(first, 3 * BATCH // 2))
    other = make_sampler(plan, ranks=3, rank=1)
    other.load_state_dict(first.state_dict())
    expected = make_sampler(plan, ranks=3, rank=1)
    expected.start_at(3)
    assert list(other) == list(expected) != []
    list(itertools.islice(first, 2))
    with pytest.raises(
        ArtifactError, match="within optimizer step 4 by 2 ranks with micro-batches of 2"
    ):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    "other",
    [
        make_plan(seed=1),
        make_plan(temperature=(1.0, 3.0)),
        make_plan(samples=41),
        make_plan(sample_weights=np.arange(1, 41, dtype=np.float32)),
    ],
)
def test_the_state_of_another_plan_is_refused(other: Plan) -> None:
    with pytest.raises(ArtifactError, match="belongs to another plan or seed"):
        make_sampler(other).load_state_dict(make_sampler(make_plan()).state_dict())


def test_what_cannot_be_divided_is_refused() -> None:
    plan = make_plan()
    with pytest.raises(
        RecipeError, match="batch of 12 samples cannot be divided into micro-batches of 5"
    ):
        make_sampler(plan, micro=5)
    with pytest.raises(RecipeError, match="rank 2 is not one of 2 ranks"):
        make_sampler(plan, ranks=2, rank=2)
    with pytest.raises(RecipeError, match="step 99 is outside the plan's"):
        make_sampler(plan).start_at(99)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_micro_batch_has_the_weights_of_its_samples(rank: int) -> None:
    row_weights = np.linspace(0.5, 2, 40, dtype=np.float32)
    plan = make_plan(sample_weights=row_weights)
    sampler = make_sampler(plan, ranks=2, micro=3, rank=rank)
    rows = np.array(list(sampler)).reshape(plan.total_steps, 2, 3)
    for step, micro_batches in enumerate(rows):
        stage = sampler.stage(step)
        mean = row_weights[stage.sample_ids].mean(dtype=np.float64)
        for micro_step, part in enumerate(micro_batches):
            actual = sampler.sample_weights(step, micro_step)
            np.testing.assert_allclose(actual, row_weights[part] / mean, rtol=1e-6)
    assert make_sampler(make_plan()).sample_weights(0, 0) is None


def test_the_stage_of_a_step() -> None:
    plan = make_plan()
    stages = [make_sampler(plan).stage(step) for step in range(plan.total_steps)]
    assert [stage.index for stage in stages] == [0] * 2 + [1] * 6
    assert (stages[0].temperature, stages[-1].temperature) == (1.0, 2.0)
