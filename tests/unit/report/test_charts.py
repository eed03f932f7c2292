"""Charts: downsampling, histograms, colors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.report import charts
from pocl_ds.report.colors import (
    RUNS_DARK,
    RUNS_LIGHT,
    SUBSETS_DARK,
    SUBSETS_LIGHT,
    color_ramp,
)
from pocl_ds.report.run_summary import DifficultyRanking, RunSummary, TrainingCurves
from pocl_ds.report.samples import evenly_spaced


def steps(values: np.ndarray, stages: np.ndarray | None = None) -> dict[str, np.ndarray]:
    stages = np.zeros(len(values)) if stages is None else stages
    return {"step": np.arange(1.0, len(values) + 1), "stage": stages.astype(float), "loss": values}


@given(st.integers(1, 5000), st.integers(1, 12), st.integers(0, 100))
def test_downsampling_keeps_the_limit_and_the_range_of_values(
    size: int, stages: int, seed: int
) -> None:
    y = np.random.default_rng(seed).normal(size=size)
    groups = np.sort(np.random.default_rng(seed + 1).integers(0, stages, size))
    points = charts.downsample(steps(y, groups), limit=600)
    assert len(points["step"]) == len(points["loss"]) <= 600
    assert len(points["step"]) == size if size <= 600 else len(points["step"]) > 300
    assert (np.diff(points["step"]) > 0).all()
    assert y.min() - 1e-12 <= points["loss"].min() and points["loss"].max() <= y.max() + 1e-12


def test_no_mean_crosses_a_change_of_stage() -> None:
    stage = np.floor(np.arange(100_000) / 30_001)
    assert set(charts.downsample(steps(stage, stage))["loss"]) == {0.0, 1.0, 2.0, 3.0}
    # Without stages there are values in between.
    assert len(set(charts.downsample(steps(stage))["loss"])) > 4


def test_bucket_means_are_means_of_finite_values() -> None:
    y = np.arange(1200.0) ** 2
    y[2] = np.nan
    y[4:6] = np.inf
    points = charts.downsample(steps(y), limit=600)
    assert points["step"][:2] == pytest.approx([1.5, 3.5])
    assert points["loss"][:2] == pytest.approx([0.5, 9.0]) and np.isnan(points["loss"][2])


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30))
def test_numbers_are_plain_json(values: list[float]) -> None:
    rounded = charts.rounded_values(np.array(values, float))
    json.dumps(rounded, allow_nan=False)
    for value, number in zip(values, rounded, strict=True):
        assert (
            number is None if not np.isfinite(value) else number == pytest.approx(value, rel=1e-4)
        )


@given(st.integers(0, 100_000), st.integers(0, 2000))
def test_evenly_spaced_indices_include_both_ends(size: int, limit: int) -> None:
    indices = evenly_spaced(size, limit)
    assert len(indices) == min(size, limit)
    assert indices.tolist() == evenly_spaced(size, limit).tolist()
    if len(indices) > 1:
        assert indices[0] == 0 and indices[-1] == size - 1
        assert np.diff(indices).max() - np.diff(indices).min() <= 1


def test_a_histogram_counts_every_sample_once() -> None:
    values = np.concatenate([np.linspace(0, 1, 990), np.full(10, 50.0)])  # ten outliers
    chart = charts._histogram("t", "x", values, [0, 300, 1000], ["a", "b"], note="")
    assert [sum(row) for row in chart["counts"]] == [300, 700]
    assert len(chart["edges"]) == charts.BINS + 1


def test_integers_have_a_bar_each() -> None:
    chart = charts._histogram(
        "t", "x", np.array([0.0, 0, 1, 3]), [0, 4], ["a"], note="", integers=True
    )
    assert chart["edges"] == [-0.5, 0.5, 1.5, 2.5, 3.5] and chart["counts"] == [[2, 1, 0, 1]]


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-9, 1e-9]])
def test_a_histogram_of_constant_values(values: list[float]) -> None:
    chart = charts._histogram("t", "x", np.array(values), [0, len(values)], ["a"], note="")
    assert sum(chart["counts"][0]) == len(values) and chart["edges"][0] < chart["edges"][-1]


def test_the_scatter_chart_is_thinned_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "MAX_DOTS", 100)
    ranking = DifficultyRanking(np.linspace(0, 1, 1000), np.linspace(5, 1, 1000), [0, 500, 1000])
    scatter = charts.difficulty_charts(RunSummary({}, ranking=ranking))[0]
    assert len(scatter["positions"]) == len(scatter["xs"]) == 100
    assert scatter["ys"][-1] == 100 and scatter["xs"][0] == 5
    assert "100 of 1,000 samples are shown" in scatter["note"]


def test_another_tokenizer_than_that_of_rouge_score_is_in_the_note() -> None:
    values = np.linspace(0, 1, 10)
    for name, expected in (("rouge_score", False), ("unicode_words", True)):
        ranking = DifficultyRanking(values, values, [0, 5, 10], rouge_tokenizer=name)
        note = charts.difficulty_charts(RunSummary({}, ranking=ranking))[-1]["note"]
        assert ("Compared by unicode words." in note) == expected


def test_curves_of_runs_are_overlaid() -> None:
    columns = {
        name: np.full(4, np.nan)
        for name in ("kd_loss", "sft_loss", "temperature", "sft_ratio", "lr", "grad_norm")
    }
    runs = {name: TrainingCurves({**steps(np.arange(4.0)), **columns}, []) for name in ("a", "b")}
    (loss,) = charts.overlay_charts(runs)  # columns without values have no chart
    assert [curve["name"] for curve in loss["series"]] == ["a", "b"]
    assert (
        loss["series"][0]["color"] != loss["series"][1]["color"]
        and loss["series"][0]["dash"] != loss["series"][1]["dash"]
    )


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_subset_colors_grow_darker_and_differ(count: int) -> None:
    for anchors in (SUBSETS_LIGHT, SUBSETS_DARK):
        colors = color_ramp(anchors, count)
        assert len(set(colors)) == count
        assert [luminance(c) for c in colors] == sorted(
            (luminance(c) for c in colors), reverse=True
        )


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colors_of_runs_contrast_with_the_background() -> None:
    for colors, background in ((RUNS_LIGHT, "#ffffff"), (RUNS_DARK, "#1a1e27")):
        for color in colors:
            low, high = sorted((luminance(color), luminance(background)))
            assert (high + 0.05) / (low + 0.05) >= 3, color  # WCAG 2, graphics
