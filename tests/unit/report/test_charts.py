"""Charts: what is handed to the page is the data, thinned but not bent."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pocl_ds.report.max_samples import thin

from pocl_ds.report import charts
from pocl_ds.report.colours import DARK, LIGHT, RUNS_DARK, RUNS_LIGHT, ramp
from pocl_ds.report.run_summary import Curves, Facts, Ranking


def steps(values: np.ndarray, stages: np.ndarray | None = None) -> dict[str, np.ndarray]:
    stages = np.zeros(len(values)) if stages is None else stages
    return {"step": np.arange(1.0, len(values) + 1), "stage": stages.astype(float), "loss": values}


@given(st.integers(1, 5000), st.integers(1, 12), st.integers(0, 100))
def test_downsampling_keeps_the_limit_and_the_range_of_values(
    size: int, stages: int, seed: int
) -> None:
    y = np.random.default_rng(seed).normal(size=size)
    groups = np.sort(np.random.default_rng(seed + 1).integers(0, stages, size))
    found = charts.downsample(steps(y, groups), limit=600)
    assert len(found["step"]) == len(found["loss"]) <= 600
    assert len(found["step"]) == size if size <= 600 else len(found["step"]) > 300
    assert (np.diff(found["step"]) > 0).all()
    assert y.min() - 1e-12 <= found["loss"].min() and found["loss"].max() <= y.max() + 1e-12


def test_no_mean_reaches_over_a_change_of_stage() -> None:
    stage = np.floor(np.arange(100_000) / 30_001)
    assert set(charts.downsample(steps(stage, stage))["loss"]) == {0.0, 1.0, 2.0, 3.0}
    assert (
        len(set(charts.downsample(steps(stage))["loss"])) > 4
    )  # without stages there are values in between


def test_bucket_means_are_means_of_finite_values() -> None:
    y = np.arange(1200.0) ** 2
    y[2] = np.nan
    y[4:6] = np.inf
    found = charts.downsample(steps(y), limit=600)
    assert found["step"][:2] == pytest.approx([1.5, 3.5])
    assert found["loss"][:2] == pytest.approx([0.5, 9.0]) and np.isnan(found["loss"][2])


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30))
def test_numbers_are_plain_json(values: list[float]) -> None:
    found = charts.numbers(np.array(values, float))
    json.dumps(found, allow_nan=False)
    for value, shown in zip(values, found, strict=True):
        assert shown is None if not np.isfinite(value) else shown == pytest.approx(value, rel=1e-4)


@given(st.integers(0, 100_000), st.integers(0, 2000))
def test_thinning_is_even_ends_included_and_repeatable(size: int, most: int) -> None:
    kept = thin(size, most)
    assert len(kept) == min(size, most)
    assert kept.tolist() == thin(size, most).tolist()
    if len(kept) > 1:
        assert kept[0] == 0 and kept[-1] == size - 1
        assert np.diff(kept).max() - np.diff(kept).min() <= 1


def test_bars_count_every_sample_once() -> None:
    values = np.concatenate([np.linspace(0, 1, 990), np.full(10, 50.0)])  # ten lie far outside
    chart = charts._bars("t", "x", values, [0, 300, 1000], ["a", "b"], note="")
    assert [sum(row) for row in chart["counts"]] == [300, 700]
    assert len(chart["edges"]) == charts.BINS + 1


def test_whole_numbers_get_a_bar_each() -> None:
    chart = charts._bars("t", "x", np.array([0.0, 0, 1, 3]), [0, 4], ["a"], note="", whole=True)
    assert chart["edges"] == [-0.5, 0.5, 1.5, 2.5, 3.5] and chart["counts"] == [[2, 1, 0, 1]]


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-9, 1e-9]])
def test_constant_data_are_drawn(values: list[float]) -> None:
    chart = charts._bars("t", "x", np.array(values), [0, len(values)], ["a"], note="")
    assert sum(chart["counts"][0]) == len(values) and chart["edges"][0] < chart["edges"][-1]


def test_the_plane_is_thinned_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "MAX_DOTS", 100)
    ranking = Ranking(np.linspace(0, 1, 1000), np.linspace(5, 1, 1000), [0, 500, 1000])
    plane = charts.difficulty_charts(Facts({}, ranking=ranking))[0]
    assert len(plane["places"]) == len(plane["xs"]) == 100
    assert plane["ys"][-1] == 100 and plane["xs"][0] == 5
    assert "100 of 1,000 samples are shown" in plane["note"]


def test_runs_are_laid_over_each_other() -> None:
    columns = {
        name: np.full(4, np.nan)
        for name in ("kd", "ce", "temperature", "sft_ratio", "lr", "grad_norm")
    }
    runs = {name: Curves({**steps(np.arange(4.0)), **columns}, []) for name in ("a", "b")}
    (loss,) = charts.overlaid(runs)  # what no run has a value of is not there
    assert [one["name"] for one in loss["series"]] == ["a", "b"]
    assert (
        loss["series"][0]["colour"] != loss["series"][1]["colour"]
        and loss["series"][0]["dash"] != loss["series"][1]["dash"]
    )


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_subset_colours_grow_darker_and_differ(count: int) -> None:
    for anchors in (LIGHT, DARK):
        colours = ramp(anchors, count)
        assert len(set(colours)) == count
        assert [luminance(c) for c in colours] == sorted(
            (luminance(c) for c in colours), reverse=True
        )


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_of_runs_stand_out_from_the_ground() -> None:
    for colours, ground in ((RUNS_LIGHT, "#ffffff"), (RUNS_DARK, "#1a1e27")):
        for colour in colours:
            low, high = sorted((luminance(colour), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 3, colour  # WCAG 2, graphics
