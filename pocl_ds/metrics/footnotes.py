"""What belongs beside a benchmark's numbers wherever they are shown: `footnotes` of results.json,
sentences by benchmark.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

MARK = "⚠"


def mark_benchmark(benchmark: str, *results: Mapping[str, Any]) -> str:
    """A benchmark's name in a table of these results, with a sign where there is more to say of it."""
    return (
        f"{benchmark} {MARK}"
        if any(benchmark in one.get("footnotes", {}) for one in results)
        else benchmark
    )


def footnotes(results: Mapping[str, Any]) -> list[str]:
    """What there is to say, a line a benchmark."""
    return merge_footnotes([("", results)], results.get("footnotes", {}))


def merge_footnotes(
    named: Sequence[tuple[str, Mapping[str, Any]]], benchmarks: Collection[str]
) -> list[str]:
    """The same of some benchmarks in several results, each line once; behind what is not said of
    all stands of whom.
    """
    found: dict[str, list[str]] = {}
    for name, results in named:
        for benchmark, said in results.get("footnotes", {}).items():
            if benchmark in benchmarks:
                found.setdefault(f"{MARK} {benchmark}: {'; '.join(said)}", []).append(name)
    return [
        line if len(names) == len(named) else f"{line} ({', '.join(dict.fromkeys(names))})"
        for line, names in found.items()
    ]
