"""Paired bootstrap: symmetries, closed forms for many items, coverage, and sentences that do not
claim too much.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pocl_ds.evaluation.comparison import FEW, compare, compare_mean, seed_deviation, sentence

SCORES = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    items = draw(st.integers(2, 40))
    return tuple(
        draw(hnp.arrays(np.float64, (items, draw(st.integers(1, 4))), elements=SCORES))
        for _ in range(2)
    )  # type: ignore[return-value]


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_a_against_b_is_minus_b_against_a(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    one, other = compare(a, b, resamples=400), compare(b, a, resamples=400)
    assert one.difference == pytest.approx(-other.difference)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)
    assert one.p == other.p and one.mean_a == other.mean_b and one.deviation_a == other.deviation_b
    assert 0 < one.p <= 1 and one.low <= one.high


@given(pairs(), st.floats(-50, 50), st.randoms())
@settings(max_examples=60, deadline=None)
def test_what_does_not_matter(
    pair: tuple[np.ndarray, np.ndarray], shift: float, random: object
) -> None:
    """A shift of both, and the order of seeds, change nothing; a shift of B alone moves the
    interval by as much.
    """
    a, b = pair
    first = compare(a, b, resamples=300)
    both = compare(a + shift, b[:, ::-1] + shift, resamples=300)
    assert both.difference == pytest.approx(first.difference, abs=1e-8)
    assert (both.low, both.high) == pytest.approx((first.low, first.high), abs=1e-8)
    moved = compare(a, b + shift, resamples=300)
    assert (moved.low, moved.high) == pytest.approx(
        (first.low + shift, first.high + shift), abs=1e-8
    )


def test_many_items_agree_with_the_normal_approximation() -> None:
    generator = np.random.default_rng(3)
    a = generator.normal(20, 10, (4000, 3))
    b = a.mean(1, keepdims=True) + generator.normal(0.3, 8, (4000, 1))
    found = compare(a, b)
    difference = b.mean(1) - a.mean(1)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    assert found.difference == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.1 * error)
    two_sided = math.erfc(abs(difference.mean()) / error / math.sqrt(2))
    assert found.p == pytest.approx(two_sided, abs=0.012)


@pytest.mark.parametrize("items", [FEW, 100])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(items: int) -> None:
    generator = np.random.default_rng(items)
    covered = 0
    for trial in range(600):
        shared = generator.gamma(2, 10, (items, 1))  # skewed, as ROUGE-L is
        a, b = (shared + generator.normal(0, 5, (items, 2)) for _ in range(2))
        found = compare(a, b + 1.5, resamples=500, seed=trial)
        covered += found.low <= 1.5 <= found.high
    # 600 trials: a standard error of 0.9%. A percentile interval of 20 items is known to be a
    # little narrow.
    assert (0.905 if items == FEW else 0.925) <= covered / 600 <= 0.975


def test_without_a_difference_one_is_seldom_shown() -> None:
    generator = np.random.default_rng(8)
    shown = sum(
        compare(*(generator.normal(size=(60, 2)) for _ in range(2)), resamples=500, seed=s).shown
        for s in range(500)
    )
    assert shown / 500 < 0.085


def test_seeds_are_averaged_within_an_item() -> None:
    """Copies of a seed add no certainty, as they would if seeds were taken for items."""
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(2, 50, 1))
    one, copies = compare(a, b), compare(np.repeat(a, 5, 1), np.repeat(b, 3, 1))
    assert (one.low, one.high, one.p) == pytest.approx((copies.low, copies.high, copies.p))
    assert seed_deviation(np.array([[1.0, 3.0], [3.0, 5.0]])) == pytest.approx(math.sqrt(2))
    assert compare(a, b).deviation_a is None


def test_the_mean_over_benchmarks_weighs_each_alike() -> None:
    generator = np.random.default_rng(2)
    small, large = (
        (generator.normal(size=(n, 2)), generator.normal(size=(n, 2))) for n in (30, 900)
    )
    large = (large[0], large[0] + 1.0)  # exactly 1 on each of its items
    small = (small[0], small[0] - 1.0)
    found = compare_mean({"small": small, "large": large})
    assert found.difference == pytest.approx(0, abs=1e-12)
    assert found.items == 930 and (found.low, found.high) == pytest.approx((0, 0), abs=1e-12)
    assert (
        compare_mean({"small": small, "large": large}).low
        == compare_mean({"large": large, "small": small}).low
    )
    one = compare_mean({"large": large})
    assert (one.mean_a, one.mean_b) == pytest.approx((large[0].mean(), large[1].mean()))


def test_sentences() -> None:
    base = np.zeros((100, 2))
    better = compare(base, base + np.random.default_rng(0).normal(2, 1, (100, 2)))
    assert sentence(better, "A", "B", "ROUGE-L").startswith("B better than A by 2.0")
    assert "p < 0.001" in sentence(better, "A", "B") and "±" in sentence(better, "A", "B")
    assert sentence(compare(base + 1, base), "A", "B").startswith("B worse than A by 1.00 ± 0.00")
    assert (
        sentence(compare(base, base), "A", "B")
        == "no difference shown between A and B: +0.00 ± 0.00, p = 1"
    )
    few = compare(base[:5], base[:5] + 1)
    assert not few.shown and "5 items are too few" in sentence(few, "A", "B")
    assert sentence(compare(base, base + 1), "A", "B") == sentence(
        compare(base, base + 1, seed=5), "A", "B"
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((3, 1)), np.zeros((4, 1))),
        (np.zeros((1, 2)), np.zeros((1, 2))),
        (np.zeros((3, 0)), np.zeros((3, 1))),
        (np.zeros(3), np.zeros(3)),
        (np.full((3, 1), np.nan), np.zeros((3, 1))),
    ],
)
def test_what_cannot_be_compared(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(ValueError):
        compare(a, b)
