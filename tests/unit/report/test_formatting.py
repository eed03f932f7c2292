"""Rows of tables from parts of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from pocl_ds.report.formatting import about_rows, source_rows, training_sentence
from pocl_ds.report.run_summary import RunSummary


def summary_with(places: dict[str, Any], scores: dict[str, Any] | None) -> RunSummary:
    """A run with a ranking of a mixture and, with `scores`, results of the student by source."""
    manifest = SimpleNamespace(info={"sources": places})
    summary = RunSummary(manifests={"rank": manifest})  # type: ignore[dict-item]
    if scores is not None:
        summary.results = {"models": {"student": {"benchmarks": {"test": {"sources": scores}}}}}
    return summary


def test_sources_have_their_place_and_their_scores() -> None:
    places = {"math": {"samples": 1200, "mean_place": 0.75}}
    scores = {"math": {"samples": 3, "rouge_l": 12.345}, "chat": {"samples": 2, "rouge_l": 40.0}}
    header, rows = source_rows(summary_with(places, scores))
    assert header == [
        "source",
        "training samples",
        "mean place",
        "test items",
        "ROUGE-L, student after",
    ]
    assert rows == [["math", "1,200", "0.75", "3", "12.35"], ["chat", "–", "–", "2", "40.00"]]
    # Before the evaluation the columns of its scores are missing; one source has no table.
    assert source_rows(summary_with(places, None)) == (header[:3], [["math", "1,200", "0.75"]])
    assert source_rows(RunSummary(manifests={}))[1] == []


def test_the_sources_of_a_mixture_are_named() -> None:
    sources = [{"source": "math.jsonl", "name": "math", "weight": 0.25}, {"source": "org/chat"}]
    rows = about_rows(RunSummary(manifests={}), {"data": {"source": None, "sources": sources}})
    assert rows == [("data", "math × 0.25, org/chat")]


@pytest.mark.parametrize(
    ("teacher_ranks", "expected"),
    [
        ({}, "on 2 ranks. Micro-batches"),
        ({"teacher_ranks": 0}, "on 2 ranks. Micro-batches"),
        ({"teacher_ranks": 1}, "on 2 ranks, and the teacher on 1 rank of its own. Micro-batches"),
        ({"teacher_ranks": 4}, "on 2 ranks, and the teacher on 4 ranks of its own. Micro"),
    ],
)
def test_the_teachers_own_ranks_are_named(teacher_ranks: dict[str, int], expected: str) -> None:
    info = {"steps": 9, "ranks": 2, "packed": True, "padding_share": 0.1, **teacher_ranks}
    summary = cast(Any, SimpleNamespace(train_info=info, curves=None))
    assert expected in training_sentence(summary)
