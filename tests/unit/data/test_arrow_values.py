"""Nested columns of Arrow tables lose the keys that Arrow added."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from record_reading import TURNS, read_one

from pocl_ds.data.arrow_values import without_nulls

values = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_values_without_nulls_stay(value: object) -> None:
    assert without_nulls(value) == value


def test_calls_of_two_tools_keep_their_own_arguments() -> None:
    def record(name: str, arguments: dict[str, int]) -> dict[str, object]:
        call = {"function": {"name": name, "arguments": arguments}}
        return {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [call]}]}

    table = pa.Table.from_pylist([record("add", {"a": 1}), record("sub", {"b": 2})])
    calls = [
        read_one(without_nulls(row)).response.tool_calls[0]["function"] for row in table.to_pylist()
    ]
    assert calls == [
        {"name": "add", "arguments": {"a": 1}},
        {"name": "sub", "arguments": {"b": 2}},
    ]


def test_maps_are_objects_and_elements_of_lists_stay() -> None:
    row = {"m": [("role", "user"), ("content", None)], "l": [None, 1], "t": None, "e": []}
    assert without_nulls(row) == {"m": {"role": "user", "content": None}, "l": [None, 1], "e": []}
