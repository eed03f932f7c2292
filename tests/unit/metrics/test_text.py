"""Exact match, repetition, distinct n-grams."""

from __future__ import annotations

import pytest

from pocl_ds.metrics.text import distinct_n, exact_match, repetition_rate


def test_exact_match_ignores_case_and_white_space_only() -> None:
    assert exact_match(" The  Answer\n", ["no", "the answer"])
    assert not exact_match("the answer.", ["the answer"])
    assert not exact_match("anything", [])


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b c d", 2, 0.0),
        ("a a a a", 1, 0.75),
        ("a b a b a b", 2, 3 / 5),
        ("a b", 3, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition_rate(text: str, n: int, share: float) -> None:
    assert repetition_rate(text, n) == pytest.approx(share)


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [
        (["a b", "a c"], 1, 3 / 4),
        (["a b", "a b"], 2, 1 / 2),
        (["a", "b"], 2, 0.0),
        ([], 1, 0.0),
        (["a b c", "b c d"], 2, 3 / 4),
    ],
)
def test_distinct_n_counts_over_all_texts(texts: list[str], n: int, share: float) -> None:
    assert distinct_n(texts, n) == pytest.approx(share)
