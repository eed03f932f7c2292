"""Durations and columns."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.runtime.formatting import align_columns, code_block, format_duration, inline_code


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


@given(st.text(alphabet="`a \n", max_size=12))
def test_no_text_ends_its_code(text: str) -> None:
    lines = code_block(text, "yaml").split("\n")
    assert lines[-1] == lines[0].removesuffix("yaml") and lines[-1] not in lines[1:-1]
    assert "\n".join(lines[1:-1]) == text.rstrip()
    span = inline_code(text)
    fence = re.match("`+", span)[0]  # type: ignore[index]
    inner = span[len(fence) : -len(fence)]
    assert "\n" not in span and span.endswith(fence)
    assert fence not in re.findall("`+", inner) and inner.strip() == " ".join(text.split())
