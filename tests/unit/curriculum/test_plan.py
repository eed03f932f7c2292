"""Subsets and stages (docs/method.md, eq. 4 to 7)."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pocl_ds.curriculum.plan import Plan, build_plan, mean_sample_visits, single_stage_plan
from pocl_ds.errors import ArtifactError, RecipeError

RELEASED = 11_435


def test_steps_of_the_released_run() -> None:
    ids = [f"s{i}" for i in range(RELEASED)]
    plan = build_plan(ids)
    assert [stage.steps for stage in plan.stages] == [352, 712, 1064, 1424]
    assert [stage.num_samples for stage in plan.stages] == [2858, 5716, 8574, 11435]
    assert [round(stage.temperature, 2) for stage in plan.stages] == [1.0, 1.33, 1.67, 2.0]
    assert [stage.sft_ratio for stage in plan.stages] == pytest.approx([0.3, 0.2, 0.1, 0.0])
    assert [stage.index for stage in plan.stages] == [0, 1, 2, 3]
    assert plan.total_steps == 352 + 712 + 1064 + 1424
    for stage in plan.stages:
        assert stage.sample_ids == ids[: stage.num_samples]


def test_eight_epochs_per_stage_equal_twenty_full_epochs() -> None:
    plan = build_plan(range(4 * 64 * 10))
    assert plan.total_steps == 20 * 40


@given(
    total=st.integers(1, 3000),
    subsets=st.integers(1, 12),
    batch=st.integers(1, 70),
    epochs=st.integers(1, 9),
    scheduler=st.sampled_from(["baby_step", "one_pass"]),
    drop_last=st.booleans(),
)
def test_stages_cover_the_order(
    total: int, subsets: int, batch: int, epochs: int, scheduler: str, drop_last: bool
) -> None:
    assume(subsets <= total and (not drop_last or total // subsets >= batch))
    order = list(range(100, 100 + total))
    plan = build_plan(
        order,
        num_subsets=subsets,
        epochs_per_stage=epochs,
        batch_size=batch,
        scheduler=scheduler,
        drop_last=drop_last,
    )
    assert (len(plan.stages), plan.batch_size, plan.scheduler, plan.drop_last) == (
        subsets,
        batch,
        scheduler,
        drop_last,
    )
    if scheduler == "baby_step":
        for i, stage in enumerate(plan.stages):
            assert (
                list(stage.sample_ids)
                == order[: total if i == subsets - 1 else (i + 1) * (total // subsets)]
            )
    else:
        assert [name for stage in plan.stages for name in stage.sample_ids] == order
        assert all(stage.num_samples == total // subsets for stage in plan.stages[:-1])
    for stage in plan.stages:
        per_epoch = (
            math.floor(stage.num_samples / batch)
            if drop_last
            else math.ceil(stage.num_samples / batch)
        )
        assert (stage.steps_per_epoch, stage.steps, stage.epochs) == (
            per_epoch,
            epochs * per_epoch,
            epochs,
        )


@pytest.mark.parametrize("scheduler", ["baby_step", "one_pass", "all_samples"])
@pytest.mark.parametrize("epochs", [4, (5, 1, 2)])
def test_mean_visits_equal_those_of_the_plan(scheduler: str, epochs: int | tuple[int, ...]) -> None:
    plan = build_plan(
        range(300), num_subsets=3, epochs_per_stage=epochs, batch_size=10, scheduler=scheduler
    )
    assert mean_sample_visits(3, epochs, scheduler) == plan.total_steps * 10 / 300
    assert [stage.epochs for stage in plan.stages] == ([4, 4, 4] if epochs == 4 else [5, 1, 2])


def test_single_subset_uses_the_first_values() -> None:
    (stage,) = build_plan(
        range(128), num_subsets=1, temperature=(1.5, 2.0), sft_ratio=(0.3, 0.0)
    ).stages
    assert (stage.num_samples, stage.temperature, stage.sft_ratio) == (128, 1.5, 0.3)


def test_stage_ids_of_an_array_are_views() -> None:
    order = np.arange(1000)
    stage = build_plan(order, num_subsets=2).stages[0]
    assert np.shares_memory(stage.sample_ids, order)


def test_equality_and_repr_ignore_the_order() -> None:
    plan, other = build_plan(np.arange(300)), build_plan(np.arange(300)[::-1])
    assert plan == other and "order" not in repr(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_subsets": 101}, "curriculum.num_subsets=101"),
        ({"num_subsets": 0}, "curriculum.num_subsets=0"),
        ({"num_subsets": 4, "batch_size": 30}, "stage 0 has 25 samples"),
        ({"epochs_per_stage": 0}, "curriculum.epochs_per_stage=0"),
        ({"num_subsets": 2, "epochs_per_stage": (1, 0)}, "curriculum.epochs_per_stage=0"),
        (
            {"num_subsets": 2, "epochs_per_stage": (1, 2, 3)},
            "curriculum.epochs_per_stage=[1, 2, 3] for curriculum.num_subsets=2",
        ),
        ({"batch_size": 0}, "train.batch_size=0"),
        ({"temperature": (0.0, 2.0)}, "curriculum.temperature"),
        ({"temperature": (1.0, -2.0)}, "curriculum.temperature"),
        ({"temperature": (1.0, math.nan)}, "curriculum.temperature"),
        ({"temperature": (1.0, math.inf)}, "curriculum.temperature"),
        ({"sft_ratio": (1.1, 0.0)}, "curriculum.sft_ratio"),
        ({"sft_ratio": (0.3, -0.1)}, "curriculum.sft_ratio"),
        ({"sft_ratio": (0.3, math.nan)}, "curriculum.sft_ratio"),
        ({"scheduler": "all"}, "curriculum.scheduler='all'"),
    ],
)
def test_invalid_values_are_errors(changes: dict, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_plan(list(range(100)), **{"batch_size": 10, **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sft_ratio_may_be_0_or_1() -> None:
    assert [
        stage.sft_ratio
        for stage in build_plan(
            range(100), num_subsets=2, batch_size=10, sft_ratio=(1.0, 0.0)
        ).stages
    ] == [1.0, 0.0]


def test_empty_order_is_an_error() -> None:
    with pytest.raises(RecipeError, match="0 samples"):
        build_plan([], num_subsets=1)


def test_small_stage_is_filled_up_without_drop_last() -> None:
    assert [
        stage.steps
        for stage in build_plan(
            range(100), batch_size=30, drop_last=False, epochs_per_stage=2
        ).stages
    ] == [2, 4, 6, 8]


def test_json_round_trips_without_ids() -> None:
    order = [f"sample-{i}" for i in range(300)]
    plan = build_plan(order, batch_size=16, scheduler="one_pass", drop_last=False)
    text = json.dumps(plan.to_json())
    assert "sample-" not in text and json.loads(text)["samples"] == 300
    assert json.loads(text)["total_steps"] == plan.total_steps
    loaded = Plan.from_json(json.loads(text), order)
    assert loaded == plan and loaded.stages[1].sample_ids == order[75:150]
    with pytest.raises(ArtifactError, match="300 samples and the ranking holds 299"):
        Plan.from_json(json.loads(text), order[1:])


@given(
    total=st.integers(1, 400),
    steps=st.integers(1, 200),
    batch=st.integers(1, 40),
    drop_last=st.booleans(),
)
def test_single_stage_has_the_requested_steps(
    total: int, steps: int, batch: int, drop_last: str
) -> None:
    assume(not drop_last or total >= batch)
    plan = single_stage_plan(
        range(total),
        steps=steps,
        batch_size=batch,
        temperature=1.0,
        sft_ratio=0.3,
        drop_last=drop_last,
    )
    (stage,) = plan.stages
    assert (
        plan.total_steps == stage.steps == steps
        and stage.num_samples == total
        and stage.sample_ids == range(total)
    )
    assert plan == Plan([stage], batch, "baby_step", drop_last)
    assert (stage.index, stage.start, stage.temperature, stage.sft_ratio) == (0, 0, 1.0, 0.3)
    assert (
        (stage.epochs - 1) * stage.steps_per_epoch < steps <= stage.epochs * stage.steps_per_epoch
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "0 steps"),
        ({"batch_size": 11}, "train.batch_size=11"),
        ({"temperature": 0.0}, "temperature"),
        ({"sft_ratio": 2.0}, "sft_ratio"),
    ],
)
def test_single_stage_errors(changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        single_stage_plan(
            range(10),
            **{"steps": 3, "batch_size": 5, "temperature": 1.0, "sft_ratio": 0.3, **changes},
        )


def test_all_samples_in_every_stage() -> None:
    plan = build_plan(
        range(10), num_subsets=3, epochs_per_stage=2, batch_size=5, scheduler="all_samples"
    )
    assert [(stage.start, stage.stop, stage.steps) for stage in plan.stages] == [(0, 10, 4)] * 3
    assert [stage.temperature for stage in plan.stages] == [1.0, 1.5, 2.0]
    assert mean_sample_visits(3, 2, "all_samples") == 6
    assert mean_sample_visits(3, (1, 2, 3), "all_samples") == 6
