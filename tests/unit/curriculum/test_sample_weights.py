"""Weights of samples and measures of difficulty, on numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.config import registry
from pocl_ds.curriculum import build_plan
from pocl_ds.curriculum.sample_scores import (
    DIFFICULTIES,
    SampleScores,
    order_by_difficulty,
    places,
)
from pocl_ds.curriculum.sample_weights import RULES, weigh_samples
from pocl_ds.errors import DataError, RecipeError


def scores(**columns: list[float]) -> SampleScores:
    arrays = {name: np.array(values, np.float64) for name, values in columns.items()}
    count = len(next(iter(arrays.values())))
    return SampleScores([f"s{i}" for i in range(count)], arrays)


def test_pass_rate_peaks_where_half_is_mastered() -> None:
    rouge = scores(rouge_l=[0.0, 0.25, 0.5, 1.0])
    assert weigh_samples(rouge, "pass_rate", {}).tolist() == [0.0, 0.1875, 0.25, 0.0]
    skewed = weigh_samples(rouge, "pass_rate", {"alpha": 2.0})
    np.testing.assert_allclose(skewed, [0, 0.046875, 0.125, 0])
    skewed = weigh_samples(rouge, "pass_rate", {"beta": 3.0})
    np.testing.assert_allclose(skewed, [0, 0.10546875, 0.0625, 0])


def test_band_keeps_the_places_between_its_ends() -> None:
    place = scores(place=[0.0, 1.0, 0.25, 0.5, 0.75])
    kept = weigh_samples(place, "band", {"easiest": 0.25, "hardest": 0.75})
    assert kept.tolist() == [0, 0, 1, 1, 1]


def test_stratified_keeps_the_hardest_and_evenly_spaced_easier_samples() -> None:
    place = scores(place=[i / 9 for i in range(10)])
    kept = weigh_samples(place, "stratified", {"share": 0.5, "hard_share": 0.6})
    # 5 samples: the 3 hardest, and of the 7 others those in the middle of each half.
    assert np.flatnonzero(kept).tolist() == [1, 5, 7, 8, 9]
    # 2 samples: the hardest, and the one in the middle of the others.
    kept = weigh_samples(place, "stratified", {"share": 0.2, "hard_share": 0.5})
    assert np.flatnonzero(kept).tolist() == [4, 9]


@given(st.integers(1, 60), st.floats(0.01, 1), st.floats(0, 1))
def test_stratified_keeps_its_share_once_each(count: int, share: float, hard: float) -> None:
    place = scores(place=np.random.default_rng(count).permutation(count).tolist())
    kept = weigh_samples(place, "stratified", {"share": share, "hard_share": hard})
    assert kept.sum() == max(1, round(share * count)) and set(kept) <= {0, 1}


def test_loss_is_the_divergence_to_a_power() -> None:
    weights = weigh_samples(scores(kd_loss=[0.5, 2.0]), "loss", {"power": 2.0})
    assert weights.tolist() == [0.25, 4.0]


def test_a_rule_without_its_column_names_it_and_the_remedy() -> None:
    with pytest.raises(RecipeError, match="needs the samples' kd_loss.*from_stage=1"):
        weigh_samples(scores(place=[0, 1]), "loss", {})
    with pytest.raises(RecipeError, match="needs the samples' rouge_l, and only place is known"):
        weigh_samples(scores(place=[0, 1]), "pass_rate", {})


READERS = {
    **{f"difficulty {name}": scores for name, scores in registry.DIFFICULTIES.items()},
    **{f"weights {name}": scores for name, scores in registry.SAMPLE_WEIGHT_SCORES.items()},
}


@pytest.mark.parametrize("reader", READERS)
def test_the_registry_has_the_scores_that_each_function_reads(reader: str) -> None:
    """Each runs with these scores alone, and with none of them left out."""
    (kind, name), needed = reader.split(), READERS[reader]
    known = {score: [0.2, 0.4, 0.6] for score in needed or ()}

    def run(columns: dict[str, list[float]]) -> None:
        arrays = {score: np.array(values) for score, values in columns.items()}
        samples = SampleScores(["a", "b", "c"], arrays)
        if kind == "difficulty":
            order_by_difficulty(samples, name)
        else:
            weigh_samples(samples, name, {})

    run(known)
    for score in known:
        with pytest.raises(RecipeError, match=f"needs the samples' {score}"):
            run({other: values for other, values in known.items() if other != score})


def test_the_tables_of_the_registry_name_the_same_functions() -> None:
    assert registry.DIFFICULTIES.keys() == DIFFICULTIES.keys()
    names = registry.SAMPLE_WEIGHTS.keys()
    assert names == RULES.keys() == registry.SAMPLE_WEIGHT_SCORES.keys()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([1.0, -0.5], "name=loss: sample s1 has weight -0.5"),
        ([float("nan"), 1.0], "name=loss: sample s0 has weight nan"),
        ([1.0, float("inf")], "name=loss: sample s1 has weight inf"),
        ([1.0, 1e300], "name=loss: sample s1 has weight inf"),  # in float32
        ([0.0, 1e-300], "name=loss: every sample has weight 0"),
        ([1.0], "weights of shape .1. for 2 samples"),
    ],
)
def test_wrong_weights_of_a_rule(
    values: list[float], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, "loss", lambda _scores, *, power: values)
    with pytest.raises(RecipeError, match=problem):
        weigh_samples(scores(place=[0, 1]), "loss", {})


def test_measures_of_difficulty() -> None:
    measured = scores(
        rouge_l=[0.1, 0.9, 0.5],
        cross_entropy=[3.0, 1.0, 2.0],
        teacher_cross_entropy=[3.0, 0.5, 0.5],
        kd_loss=[0.2, 0.1, 0.3],
    )
    # Ratios 1, 2 and 4.
    assert order_by_difficulty(measured, "loss_ratio").tolist() == [0, 1, 2]
    assert order_by_difficulty(measured, "cross_entropy").tolist() == [1, 2, 0]
    assert order_by_difficulty(measured, "kd_loss").tolist() == [1, 0, 2]
    assert order_by_difficulty(measured, "fusion").tolist() == [1, 2, 0]
    assert order_by_difficulty(measured, "fusion", reverse=True).tolist() == [0, 2, 1]
    ties = scores(kd_loss=[1.0, 1.0, 0.0])
    assert order_by_difficulty(ties, "kd_loss").tolist() == [2, 0, 1]
    with pytest.raises(RecipeError, match="one finite number for each of 2 samples"):
        order_by_difficulty(scores(kd_loss=[1.0, float("nan")]), "kd_loss")
    assert places(np.array([2, 0, 1])).tolist() == [0.5, 1.0, 0.0]


def test_a_plan_leaves_out_what_weighs_nothing() -> None:
    order, weights = np.array([4, 2, 0, 3, 1]), np.array([1, 0, 3, 2, 2], np.float32)
    plan = build_plan(
        order, num_subsets=2, epochs_per_stage=1, batch_size=2, sample_weights=weights
    )
    assert [list(stage.sample_ids) for stage in plan.stages] == [[4, 2], [4, 2, 0, 3]]
    # The mean over each stage's samples is 1: (2 + 3) / 2 and (2 + 3 + 1 + 2) / 4.
    first, second = (stage.weights for stage in plan.stages)
    assert first is not None and second is not None
    np.testing.assert_allclose(first[[4, 2]], [0.8, 1.2])
    np.testing.assert_allclose(second[[4, 2, 0, 3]], np.array([2, 3, 1, 2]) / 2)
    equal = build_plan(
        order, num_subsets=1, batch_size=2, sample_weights=(weights > 0).astype(np.float32)
    )
    assert equal.stages[0].weights is None and equal.stages[0].num_samples == 4


@pytest.mark.parametrize(
    ("weights", "problem"),
    [([1, -1], "row 1 has weight -1"), ([0, 0], "every sample has weight 0")],
)
def test_a_plan_refuses_wrong_weights(weights: list[float], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        build_plan(np.arange(2), batch_size=1, sample_weights=np.array(weights, np.float32))


def test_a_stage_with_another_order_keeps_its_optimizer_steps() -> None:
    plan = build_plan(np.arange(12), num_subsets=2, epochs_per_stage=2, batch_size=3)
    weights = np.array([0] * 6 + [1] * 6, np.float32)
    stage = plan.with_order(1, np.arange(12)[::-1], weights)
    assert list(stage.sample_ids) == [11, 10, 9, 8, 7, 6]
    assert (stage.steps, stage.steps_per_epoch, stage.epochs) == (8, 2, 4)
    assert plan.with_order(0, np.arange(12)[::-1]).sample_ids[0] == 11
    with pytest.raises(RecipeError, match="stage 0 has 1 samples, fewer than train.batch_size=3"):
        plan.with_order(0, np.arange(12), np.array([0] * 9 + [1] * 3, np.float32))
