"""What belongs beside a benchmark's numbers wherever they are shown: `marks` of results.json, sentences by benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MARK = "⚠"


def marked(results: Mapping[str, Any], benchmark: str) -> str:
    """A benchmark's name in a table, with a sign where there is more to say of it."""
    return f"{benchmark} {MARK}" if benchmark in results.get("marks", {}) else benchmark


def mark_lines(results: Mapping[str, Any]) -> list[str]:
    """What there is to say, a line a benchmark."""
    return [f"{MARK} {benchmark}: {'; '.join(said)}" for benchmark, said in results.get("marks", {}).items()]
