"""Charts: what is drawn is the data, thinned but not bent."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pocl_ds.report.figures import DARK, LIGHT, ramp

from pocl_ds.report import charts


@given(st.integers(1, 5000), st.integers(1, 12), st.integers(0, 100))
def test_downsampling_keeps_the_limit_and_the_mean_of_every_stage(size: int, stages: int, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=size)
    x = np.arange(1.0, size + 1)
    groups = np.sort(np.random.default_rng(seed + 1).integers(0, stages, size)).astype(float)
    thin_x, thin_y = charts.downsample(x, y, groups)
    assert len(thin_x) == len(thin_y) <= charts.MAX_POINTS
    assert len(thin_x) == size if size <= charts.MAX_POINTS else len(thin_x) > charts.MAX_POINTS / 2
    assert (np.diff(thin_x) > 0).all()
    assert y.min() - 1e-12 <= thin_y.min() and thin_y.max() <= y.max() + 1e-12


def test_no_bucket_reaches_over_a_change_of_stage() -> None:
    x = np.arange(1.0, 100_001)
    stage = np.floor((x - 1) / 30_001)
    _, y = charts.downsample(x, stage, stage)
    assert set(y) == {0.0, 1.0, 2.0, 3.0}  # a bucket over a border would have a mean in between
    _, blurred = charts.downsample(x, stage)
    assert len(set(blurred)) > 4


def test_bucket_means_are_means() -> None:
    x, y = charts.downsample(np.arange(1200.0), np.arange(1200.0) ** 2, limit=600)
    assert len(x) == 600
    assert x[:2] == pytest.approx([0.5, 2.5])
    assert y[:2] == pytest.approx([0.5, 6.5])


def test_values_that_are_not_finite_leave_no_trace() -> None:
    x, y = charts.downsample(np.arange(4.0), np.array([1.0, np.nan, np.inf, 2.0]))
    assert x.tolist() == [0.0, 3.0] and y.tolist() == [1.0, 2.0]


@given(st.integers(0, 100_000))
def test_thinning_is_even_ends_included_and_repeatable(size: int) -> None:
    kept = charts.thin(size)
    assert len(kept) == min(size, charts.MAX_DOTS)
    assert kept.tolist() == charts.thin(size).tolist()
    if size:
        assert kept[0] == 0 and kept[-1] == size - 1
    if size > 1:
        assert np.diff(kept).max() - np.diff(kept).min() <= 1


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    found = charts.ticks(low, low + width)
    assert 1 <= len(found) <= 8
    slack = 1e-6 * width + 4 * math.ulp(abs(low) + width)
    assert all(low - slack <= value <= low + width + slack for value in found)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (12000, "12k"), (2.5e6, "2.5M"), (3e-4, "3·10⁻⁴"), (-5, "-5"), (1e-5, "1·10⁻⁵")]
)
def test_tick_text(value: float, text: str) -> None:
    assert charts.tick_text(value) == text


def test_a_line_lands_where_its_data_are() -> None:
    line = charts.Line("a", "c-ce", np.array([0.0, 10.0]), np.array([0.0, 1.0]))
    svg = charts.line_chart("<t>", [line], x_label="x & unit", y_label="y", bands=[charts.Band(0, 5, "stage 1")])
    root = ElementTree.fromstring(svg)  # well-formed, title escaped
    assert root.find("title").text == "<t>"  # type: ignore[union-attr]
    path = next(e for e in root.iter("path") if "line" in e.get("class", ""))
    (x0, y0), (x1, y1) = (map(float, pair) for pair in re.findall(r"([\d.]+) ([\d.]+)", path.get("d", "")))
    assert (x0, x1) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert y0 > y1  # more is higher
    band = next(e for e in root.iter("rect"))
    assert float(band.get("width", 0)) == pytest.approx((x1 - x0) / 2, abs=0.1)
    labels = [e.text for e in root.iter("text")]
    assert {"x & unit", "y", "stage 1"} <= set(labels)


def test_histogram_bars_are_as_high_as_their_counts() -> None:
    groups = [np.zeros(30), np.array([0.0] * 10 + [1.0] * 20)]
    root = ElementTree.fromstring(charts.histogram("h", groups, ["s0", "s1"], x_label="x", y_label="n", bins=2))
    bars = {e.get("class"): re.findall(r"v(-?[\d.]+)", e.get("d", "")) for e in root.iter("path") if "bar" in e.get("class", "")}
    (first,), (second, third) = ([-float(height) for height in bars[name]] for name in ("bar s0", "bar s1"))
    assert first / second == pytest.approx(3, rel=0.02) and third / second == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-9, 1e-9]])
def test_constant_data_are_drawn(values: list[float]) -> None:
    data = np.array(values)
    line = charts.Line("a", "c", np.arange(len(data), dtype=float), data)
    for svg in (
        charts.line_chart("t", [line], x_label="x", y_label="y", from_zero=True),
        charts.histogram("t", [data], ["s0"], x_label="x", y_label="y"),
        charts.scatter("t", [(data, data)], ["s0"], x_label="x", y_label="y"),
    ):
        ElementTree.fromstring(svg)
        assert "nan" not in svg and "inf" not in svg


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_subset_colours_grow_darker_and_differ(count: int) -> None:
    for anchors in (LIGHT, DARK):
        colours = ramp(anchors, count)
        light = [0.2126 * int(c[1:3], 16) + 0.7152 * int(c[3:5], 16) + 0.0722 * int(c[5:7], 16) for c in colours]
        assert len(set(colours)) == count
        assert light == sorted(light, reverse=True)  # told apart by lightness alone
