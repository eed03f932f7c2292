"""Footnotes of benchmark results: caveats that belong next to a benchmark's numbers everywhere.

results.json holds them under `footnotes`, as sentences by benchmark.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

MARK = "⚠"


def mark_benchmark(benchmark: str, *results: Mapping[str, Any]) -> str:
    """A benchmark's name for a table, with MARK if any of these results has a footnote on it."""
    has_footnote = any(benchmark in result.get("footnotes", {}) for result in results)
    return f"{benchmark} {MARK}" if has_footnote else benchmark


def footnotes(results: Mapping[str, Any]) -> list[str]:
    """The footnotes of one result, one line per benchmark."""
    return merge_footnotes([("", results)], results.get("footnotes", {}))


def merge_footnotes(
    named_results: Sequence[tuple[str, Mapping[str, Any]]], benchmarks: Collection[str]
) -> list[str]:
    """The footnotes of several results on some benchmarks, each line once.

    A line that does not hold for all results names those it holds for.
    """
    names_by_line: dict[str, list[str]] = {}
    for name, results in named_results:
        for benchmark, sentences in results.get("footnotes", {}).items():
            if benchmark in benchmarks:
                line = f"{MARK} {benchmark}: {'; '.join(sentences)}"
                names_by_line.setdefault(line, []).append(name)
    return [
        line if len(names) == len(named_results) else f"{line} ({', '.join(dict.fromkeys(names))})"
        for line, names in names_by_line.items()
    ]
