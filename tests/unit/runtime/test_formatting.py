"""Durations and columns."""

from __future__ import annotations

import pytest

from pocl_ds.runtime.formatting import align_columns, format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.21, "3.2 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (7500, "2 h 05 min"),
        (float("inf"), "?"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_columns_are_aligned() -> None:
    rows = [["", "loss"], ["student", "4.25"], ["all", "10.5"]]
    assert align_columns(rows) == ["         loss", "student  4.25", "all      10.5"]
    assert align_columns(rows, numbers=True, rule=True) == [
        "         loss",
        "-------  ----",
        "student  4.25",
        "all      10.5",
    ]
    assert align_columns([["a", "bb"], ["a", "b"]], numbers=True) == ["a  bb", "a   b"]
