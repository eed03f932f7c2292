"""The plot of effects and the learning curves of a study."""

from __future__ import annotations

import re

import numpy as np

from pocl_ds.study.cells import StudyConfig
from pocl_ds.study.differences import Difference
from pocl_ds.study.learning_curves import LearningCurves
from pocl_ds.study.page import MAX_GROUPS, effect_plot, learning_charts
from pocl_ds.study.table import Pair


def pair(label: str, mean: float, low: float, high: float) -> Pair:
    return Pair(label, np.zeros((30, 3)), Difference(mean, low, high, 0.01, 3, 30))


def test_effects_are_drawn_to_scale() -> None:
    svg = effect_plot([pair("a against b <1>", 2, 1, 3), pair("c against d", 0, -4, 4)])
    lines = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"[^>]* stroke="([^"]+)"', svg)
    (zero, _, _), first, second = [(float(a), float(b), color) for a, b, color in lines]
    unit = (second[1] - second[0]) / 8
    assert (first[0] - zero) / unit == 1 and (first[1] - zero) / unit == 3
    assert (zero - second[0]) / unit == 4
    assert first[2] == "var(--accent)" and second[2] == "var(--soft)"  # its interval holds 0
    assert "a against b &lt;1&gt;" in svg and ">-4.0</text>" in svg and ">+4.0</text>" in svg
    assert effect_plot([]) == ""


def test_learning_curves_have_the_compared_arms_first() -> None:
    losses = np.array([[3.0, 2.0, 2.5], [5.0, 4.0, 4.5]])
    curves = [
        LearningCurves(f"arm{n}, fkl", [5, 10, 15], {"easy": losses + n, "hard": losses})
        for n in range(MAX_GROUPS + 2)
    ]
    study = StudyConfig(
        name="s",
        base="b",
        arms={f"arm{n}": () for n in range(MAX_GROUPS + 2)},
        compare=(("arm9", "arm8"),),
    )
    easy, hard = learning_charts(curves, study)
    assert (easy["title"], hard["title"]) == ("easy", "hard")
    assert [s["name"].split(",")[0] for s in easy["series"]] == [
        "arm8",
        "arm9",
        *(f"arm{n}" for n in range(MAX_GROUPS - 2)),
    ]
    assert easy["series"][0]["ys"] == [12.0, 11.0, 11.5] and hard["series"][0]["xs"] == [5, 10, 15]
    assert curves[0].forgetting("easy").tolist() == [0.5, 0.5]
    assert learning_charts([], study) == []
