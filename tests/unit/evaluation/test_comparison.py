"""The paired bootstrap: symmetries, the normal approximation, coverage, sentences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pocl_ds.evaluation.comparison import (
    MIN_ITEMS,
    compare_benchmark_means,
    compare_ratios,
    compare_scores,
    comparison_sentence,
    seed_deviation,
)

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
def test_swapping_the_models_swaps_the_signs(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    forward, backward = compare_scores(a, b, resamples=400), compare_scores(b, a, resamples=400)
    assert forward.difference == pytest.approx(-backward.difference)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low), abs=1e-9)
    assert forward.p == backward.p and forward.mean_a == backward.mean_b
    assert forward.deviation_a == backward.deviation_b
    assert 0 < forward.p <= 1 and forward.low <= forward.high


@given(pairs(), st.floats(-50, 50), st.randoms())
@settings(max_examples=60, deadline=None)
def test_shifts_and_the_order_of_seeds_do_not_matter(
    pair: tuple[np.ndarray, np.ndarray], shift: float, random: object
) -> None:
    """Shifting both, or reordering seeds, changes nothing; shifting B shifts the interval."""
    a, b = pair
    original = compare_scores(a, b, resamples=300)
    shifted = compare_scores(a + shift, b[:, ::-1] + shift, resamples=300)
    assert shifted.difference == pytest.approx(original.difference, abs=1e-8)
    assert (shifted.low, shifted.high) == pytest.approx((original.low, original.high), abs=1e-8)
    moved = compare_scores(a, b + shift, resamples=300)
    assert (moved.low, moved.high) == pytest.approx(
        (original.low + shift, original.high + shift), abs=1e-8
    )


def test_many_items_agree_with_the_normal_approximation() -> None:
    generator = np.random.default_rng(3)
    a = generator.normal(20, 10, (4000, 3))
    b = a.mean(1, keepdims=True) + generator.normal(0.3, 8, (4000, 1))
    result = compare_scores(a, b)
    difference = b.mean(1) - a.mean(1)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    assert result.difference == pytest.approx(difference.mean())
    assert result.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.1 * error)
    assert result.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.1 * error)
    two_sided = math.erfc(abs(difference.mean()) / error / math.sqrt(2))
    assert result.p == pytest.approx(two_sided, abs=0.012)


@pytest.mark.parametrize("items", [MIN_ITEMS, 100])
def test_the_interval_covers_the_truth_in_about_95_percent(items: int) -> None:
    generator = np.random.default_rng(items)
    covered = 0
    for trial in range(600):
        shared = generator.gamma(2, 10, (items, 1))  # skewed, as ROUGE-L is
        a, b = (shared + generator.normal(0, 5, (items, 2)) for _ in range(2))
        result = compare_scores(a, b + 1.5, resamples=500, seed=trial)
        covered += result.low <= 1.5 <= result.high
    # 600 trials: a standard error of 0.9%. A percentile interval of 20 items is known to be a
    # little narrow.
    assert (0.905 if items == MIN_ITEMS else 0.925) <= covered / 600 <= 0.975


def test_equal_models_seldom_differ_significantly() -> None:
    generator = np.random.default_rng(8)
    significant = sum(
        compare_scores(
            *(generator.normal(size=(60, 2)) for _ in range(2)), resamples=500, seed=s
        ).is_significant
        for s in range(500)
    )
    assert significant / 500 < 0.085


def test_seeds_are_averaged_within_an_item() -> None:
    """Copies of a seed add no certainty, as they would if seeds counted as items."""
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(2, 50, 1))
    single, copies = compare_scores(a, b), compare_scores(np.repeat(a, 5, 1), np.repeat(b, 3, 1))
    assert (single.low, single.high, single.p) == pytest.approx((copies.low, copies.high, copies.p))
    assert seed_deviation(np.array([[1.0, 3.0], [3.0, 5.0]])) == pytest.approx(math.sqrt(2))
    assert compare_scores(a, b).deviation_a is None


def test_benchmarks_have_equal_weight_in_the_mean() -> None:
    generator = np.random.default_rng(2)
    small, large = (
        (generator.normal(size=(n, 2)), generator.normal(size=(n, 2))) for n in (30, 900)
    )
    large = (large[0], large[0] + 1.0)  # exactly 1 on each of its items
    small = (small[0], small[0] - 1.0)
    result = compare_benchmark_means({"small": small, "large": large})
    assert result.difference == pytest.approx(0, abs=1e-12)
    assert result.items == 930 and (result.low, result.high) == pytest.approx((0, 0), abs=1e-12)
    assert (
        compare_benchmark_means({"small": small, "large": large}).low
        == compare_benchmark_means({"large": large, "small": small}).low
    )
    only_large = compare_benchmark_means({"large": large})
    assert (only_large.mean_a, only_large.mean_b) == pytest.approx(
        (large[0].mean(), large[1].mean())
    )


def test_the_sentence_states_direction_margin_and_p() -> None:
    base = np.zeros((100, 2))
    better = compare_scores(base, base + np.random.default_rng(0).normal(2, 1, (100, 2)))
    assert comparison_sentence(better, "A", "B", "ROUGE-L").startswith("B is better than A by 2.0")
    assert "p < 0.001" in comparison_sentence(better, "A", "B") and "±" in comparison_sentence(
        better, "A", "B"
    )
    assert comparison_sentence(compare_scores(base + 1, base), "A", "B").startswith(
        "B is worse than A by 1.00 ± 0.00"
    )
    assert (
        comparison_sentence(compare_scores(base, base), "A", "B")
        == "no difference shown between A and B: +0.00 ± 0.00, p = 1"
    )
    few = compare_scores(base[:5], base[:5] + 1)
    assert not few.is_significant and "5 items are too few" in comparison_sentence(few, "A", "B")
    assert comparison_sentence(compare_scores(base, base + 1), "A", "B") == comparison_sentence(
        compare_scores(base, base + 1, seed=5), "A", "B"
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
def test_invalid_scores_are_rejected(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(ValueError):
        compare_scores(a, b)


def test_ratios_are_compared_over_all_tokens() -> None:
    """Against resampling by hand, and the normal approximation of a ratio of means."""
    source = np.random.default_rng(3)
    sizes = source.integers(1, 20, 400).astype(float)
    a = sizes * source.normal(2.0, 0.5, 400)
    b = a - sizes * source.normal(0.3, 0.4, 400)
    result = compare_ratios(a, b, sizes)
    assert result.mean_a == pytest.approx(a.sum() / sizes.sum())
    assert result.difference == pytest.approx((b - a).sum() / sizes.sum())
    residuals = (b - a) - result.difference * sizes
    error = residuals.std(ddof=1) / math.sqrt(len(a)) / sizes.mean()
    assert result.half_width == pytest.approx(1.96 * error, rel=0.05)
    assert result.low < result.difference < result.high and result.is_significant
    drawn = [source.integers(0, 400, 400) for _ in range(2000)]
    by_hand = [(b - a)[rows].sum() / sizes[rows].sum() for rows in drawn]
    assert np.quantile(by_hand, [0.025, 0.975]) == pytest.approx(
        [result.low, result.high], abs=0.1 * result.half_width
    )
