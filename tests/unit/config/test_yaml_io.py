"""Numbers with an exponent are numbers, and written values are read back unchanged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.config.yaml_io import dump_yaml, parse_yaml

AMBIGUOUS = r"[-+]?[0-9_]*\.?[0-9]*([eE][-+]?[0-9]+)?|true|no|~|null|2026-11-26|0x1f|0o7|1:30"
texts = st.from_regex(AMBIGUOUS, fullmatch=True) | st.text(
    st.characters(exclude_characters="\0", exclude_categories=("Cs",))
)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | texts
)
values = st.recursive(
    scalars,
    lambda of: st.lists(of, max_size=4) | st.dictionaries(texts, of, max_size=4),
    max_leaves=12,
)


@given(values)
def test_written_values_are_read_back(value: Any) -> None:
    read_back = parse_yaml(dump_yaml(value))
    assert read_back == value and repr(read_back) == repr(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E4", 50000.0),
        ("-2e+1", -20.0),
        ("1.5e-3", 0.0015),
        ("1e", "1e"),
        ("e3", "e3"),
        ("1e-3x", "1e-3x"),
        ("'1e-3'", "1e-3"),
    ],
)
def test_a_number_with_an_exponent(text: str, value: float | str) -> None:
    number = parse_yaml(text)
    assert number == value and type(number) is type(value)
