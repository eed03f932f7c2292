"""Statistics of answers."""

from __future__ import annotations

import pytest

from pocl_ds.evaluation.answers import summarize_sources


def test_sources_of_a_mixture_are_averaged_over_items_and_seeds() -> None:
    """Two seeds; source b has one item, source a two."""
    seeds = [
        [{"source": s, "rouge_l": r} for s, r in (("b", 0.5), ("a", 0.0), ("a", 1.0))],
        [{"source": s, "rouge_l": r} for s, r in (("b", 0.7), ("a", 0.2), ("a", 0.4))],
    ]
    summary = summarize_sources(seeds)["sources"]
    assert list(summary) == ["a", "b"]
    assert summary["a"] == {"samples": 2, "rouge_l": pytest.approx(40.0)}
    assert summary["b"] == {"samples": 1, "rouge_l": pytest.approx(60.0)}
    assert summarize_sources([[{"rouge_l": 0.5}]]) == {}
