"""Ids are the records' own or follow from the content, and no two of a source are equal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.data.sample_ids import MAX_ID_BYTES, SampleIds
from pocl_ds.errors import DataError


def ids_of(values: list[Any], duplicates: str = "suffix") -> list[str]:
    ids = SampleIds(duplicates, "data.fields.id")
    return [
        ids.sample_id(value, b"content", f"a b.jsonl line {line}")
        for line, value in enumerate(values, 1)
    ]


@given(st.lists(st.sampled_from(["x", "x-1", "x-2", "x-1-1", "y", 7, None, ""]), max_size=12))
def test_ids_are_unique_and_the_first_keeps_its_name(values: list[Any]) -> None:
    ids = ids_of(values)
    assert len(set(ids)) == len(values) and ids == ids_of(values)
    if values and values[0]:
        assert ids[0] == str(values[0])


def test_suffixes_avoid_ids_of_the_records() -> None:
    assert ids_of(["x", "x-1", "x", "x", "x-1"]) == ["x", "x-1", "x-2", "x-3", "x-1-1"]


def test_equal_content_is_numbered() -> None:
    first, *others = ids_of([None, float("nan"), ""], "error")
    assert len(first) == 16 and others == [f"{first}-1", f"{first}-2"]


def test_an_error_names_both_places_of_an_id() -> None:
    ids = SampleIds("error", "data.fields.id")
    ids.sample_id("x", b"", "one.jsonl line 3")
    ids.sample_id("y", b"", "two.jsonl line 3")
    with pytest.raises(DataError) as caught:
        ids.sample_id("x", b"", "two.jsonl line 4")
    assert str(caught.value) == (
        "two.jsonl line 4: id 'x' also occurs at one.jsonl line 3: make ids unique, or set "
        "data.duplicate_ids=suffix to number them or data.fields.id=null to ignore them"
    )
    assert caught.value.reason == "duplicate id"
    ids.sample_id("z", b"", "a place without a number")
    with pytest.raises(DataError, match="also occurs at a place without a number: make"):
        ids.sample_id("z", b"", "two.jsonl line 5")


@pytest.mark.parametrize("value", ["a\nb", "a\0b", "é" * 65, "\ud800", True, [1], 1.5])
def test_invalid_ids_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"^a b.jsonl line 1: an id must be") as caught:
        ids_of([value])
    assert caught.value.reason == "invalid id"


def test_the_longest_id_is_accepted_without_a_suffix() -> None:
    longest = "é" * (MAX_ID_BYTES // 2)
    assert ids_of([longest]) == [longest]
    with pytest.raises(DataError, match="line 2: an id must be at most 128 bytes"):
        ids_of([longest, longest])
