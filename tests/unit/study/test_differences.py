"""Differences between arms: intervals over items and trainings at once, Holm, power."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from pocl_ds.study.differences import detectable_difference, holm, two_level_difference


def test_a_constant_difference_is_significant() -> None:
    difference = two_level_difference(np.full((30, 3), 2.0), resamples=200)
    assert (difference.mean, difference.low, difference.high) == (
        2.0,
        2.0,
        2.0,
    ) and difference.p < 0.02
    assert difference.sentence() == "better by 2.00 ± 0.00, p = 0.01, 3 trainings each"
    assert (
        two_level_difference(np.full((30, 1), -2.0), resamples=200).sentence()
        == "worse by 2.00 ± 0.00, p = 0.01, 1 training each"
    )


def test_trainings_that_disagree_show_no_difference_for_any_number_of_items() -> None:
    source = np.random.default_rng(0)
    differences = source.normal(0, 0.1, (2000, 3)) + np.array([1.0, -1.0, 0.3])
    difference = two_level_difference(differences, resamples=500)
    assert difference.low < 0 < difference.high and difference.sentence().startswith(
        "no difference shown: +0.10 ±"
    )
    assert (
        two_level_difference(differences[:, :1], resamples=500).low > 0
    )  # one training alone would claim it


def test_the_interval_of_few_trainings_has_its_coverage() -> None:
    """Studies have about three seeds. Drawing them with replacement would cover the truth in
    only four of five trials.
    """
    source, covered = np.random.default_rng(2), 0
    for trial in range(300):
        difference = two_level_difference(
            source.normal(0, 3.0, (60, 3)) + source.normal(0, 1.5, 3), resamples=500, seed=trial
        )
        covered += difference.low <= 0 <= difference.high
    assert covered >= 0.92 * 300


def test_the_interval_has_its_theoretical_width() -> None:
    source = np.random.default_rng(1)
    differences = source.normal(0, 3.0, (400, 40)) + source.normal(0, 2.0, 40)
    means = differences.mean(0)
    variance = means.var() / 40 + differences.mean(1).var() / 400
    difference = two_level_difference(differences, resamples=2000)
    assert (difference.high - difference.low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.12)


@settings(deadline=None, max_examples=20)
@given(arrays(np.float64, (5, 2), elements=st.floats(-10, 10, width=32)))
def test_swapping_the_sides_negates_the_difference(differences: np.ndarray) -> None:
    one, other = (
        two_level_difference(differences, resamples=300),
        two_level_difference(-differences, resamples=300),
    )
    assert (one.mean, one.low, one.high) == pytest.approx(
        (-other.mean, -other.high, -other.low)
    ) and one.p == other.p


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values: list[float]) -> None:
    """Holm (1979): test the smallest p at level / m, the next at level / (m - 1), and stop at the
    first that fails.
    """
    level, rejected = 0.05, set[int]()
    for place, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        if p_values[index] * (len(p_values) - place) > level:
            break
        rejected.add(index)
    adjusted = holm(p_values)
    assert {index for index, p in enumerate(adjusted) if p <= level} == rejected
    assert all(0 <= p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))


def test_holm_of_known_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@pytest.mark.parametrize("trainings", [3, 10])
def test_a_detectable_difference_is_found_as_often_as_it_says(trainings: int) -> None:
    """Simulated studies of this difference: items and trainings vary, and each answer has noise."""
    source = np.random.default_rng(trainings)
    items, found, trials = 200, 0, 400

    def draw(count: int) -> np.ndarray:
        return (
            source.normal(0, 20, (items, 1))
            + source.normal(0, 2, (1, count))
            + source.normal(0, 20, (items, count))
        )

    # The mean of many estimates is the one of a pilot without luck.
    difference = np.mean([detectable_difference(draw(10), trainings) for _ in range(50)])
    for trial in range(trials):
        result = two_level_difference(draw(trainings) + difference, resamples=400, seed=trial)
        found += result.low > 0
    lowest, _ = stats.binom.interval(0.999, trials, 0.8)
    assert lowest <= found <= 0.97 * trials, found / trials


def test_more_trainings_detect_less() -> None:
    differences = np.random.default_rng(0).normal(0, 1, (300, 4))
    values = [detectable_difference(differences, count) for count in (2, 3, 5, 10, 100)]
    assert values == sorted(values, reverse=True)
