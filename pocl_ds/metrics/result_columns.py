"""The columns of scores that every table of evaluation results has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def result_columns(results: Mapping[str, Any], benchmarks: Sequence[str]) -> list[tuple[str, str]]:
    """(measure, benchmark) of each column: `correct` of those that are verified, then `rouge_l` of
    all.

    results: the content of results.json.
    """
    entries = [entry["benchmarks"] for entry in results["models"].values()]
    verified = [
        name for name in benchmarks if any("correct" in entry.get(name, {}) for entry in entries)
    ]
    return [("correct", name) for name in verified] + [("rouge_l", name) for name in benchmarks]
