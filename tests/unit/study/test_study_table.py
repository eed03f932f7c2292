"""Intervals over items and trainings at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pocl_ds.study.table import two_level


def test_a_difference_that_is_everywhere_is_shown() -> None:
    found = two_level(np.full((30, 3), 2.0), resamples=200)
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0) and found.p < 0.02
    assert found.sentence == "better by 2.00 ± 0.00, p = 0.01, 3 trainings each"
    assert two_level(np.full((30, 1), -2.0), resamples=200).sentence == "worse by 2.00 ± 0.00, p = 0.01, 1 training each"


def test_trainings_that_disagree_show_nothing_however_many_items_there_are() -> None:
    source = np.random.default_rng(0)
    differences = source.normal(0, 0.1, (2000, 3)) + np.array([1.0, -1.0, 0.3])
    found = two_level(differences, resamples=500)
    assert found.low < 0 < found.high and found.sentence.startswith("no difference shown: +0.10 ±")
    assert two_level(differences[:, :1], resamples=500).low > 0  # one training alone would have claimed it


def test_few_trainings_that_scatter_are_covered_as_often_as_the_interval_says() -> None:
    """Three seeds are what studies have: drawn with replacement, as items are, they covered the truth in four of five trials."""
    source, covered = np.random.default_rng(2), 0
    for trial in range(300):
        found = two_level(source.normal(0, 3.0, (60, 3)) + source.normal(0, 1.5, 3), resamples=500, seed=trial)
        covered += found.low <= 0 <= found.high
    assert covered >= 0.92 * 300


def test_the_interval_has_the_size_that_theory_gives() -> None:
    source = np.random.default_rng(1)
    differences = source.normal(0, 3.0, (400, 40)) + source.normal(0, 2.0, 40)
    means = differences.mean(0)
    variance = means.var() / 40 + differences.mean(1).var() / 400
    found = two_level(differences, resamples=2000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.12)


@settings(deadline=None, max_examples=20)
@given(arrays(np.float64, (5, 2), elements=st.floats(-10, 10, width=32)))
def test_turned_round_it_says_the_opposite(differences: np.ndarray) -> None:
    one, other = two_level(differences, resamples=300), two_level(-differences, resamples=300)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low)) and one.p == other.p
