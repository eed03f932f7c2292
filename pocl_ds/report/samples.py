"""Training samples to browse: what was asked, what the data answers, what the student wrote before,
and how hard that is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.run_dir import RunDirectory

LONGEST = 700  # characters of a text that the page holds
RECORD = 40  # bytes of a record beside its texts


@dataclass(frozen=True)
class Sample:
    """place: in the order, easiest first, from 0. response: the initial student's, None where
    nothing was scored.
    """

    place: int
    id: str
    prompt: str
    reference: str
    response: str | None


@dataclass(frozen=True)
class Samples:
    """Those that the page holds, evenly spaced along the order, of `total`."""

    total: int
    rows: list[Sample]


def read_samples(run: RunDirectory, most: int, room: int) -> Samples:
    """At most `most` samples whose texts take at most `room` bytes. Raises ArtifactError where
    files contradict each other.
    """
    order = np.load(run.ranking / "order.npy", mmap_mode="r")
    places = thin(len(order), most)
    lines = _lines(run.data / "train.jsonl", {int(order[place]) for place in places})
    found = [(int(place), lines[int(order[place])]) for place in places]
    written = _responses(run.scores, {record["id"] for _, record in found})
    rows = [
        Sample(
            place,
            record["id"],
            cut(_asked(record)),
            cut(record["references"][0]),
            written.get(record["id"]),
        )
        for place, record in found
    ]
    weights = np.array(
        [weight([row.id, row.prompt, row.reference, row.response or ""]) for row in rows], np.int64
    )
    while len(rows) and weights.sum() > room:
        kept = thin(len(rows), int(0.98 * len(rows) * room / weights.sum()))
        rows, weights = [rows[i] for i in kept], weights[kept]
    return Samples(len(order), rows)


def thin(size: int, most: int) -> NDArray[np.int64]:
    """At most `most` positions of 0..size-1, evenly spaced, always the same."""
    if not size or not most:
        return np.empty(0, np.int64)
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(np.int64))


def cut(text: str) -> str:
    """The beginning of a long text, with a mark."""
    return text if len(text) <= LONGEST else text[:LONGEST] + " […]"


def weight(texts: Sequence[str]) -> int:
    """Bytes that texts take in the page."""
    return RECORD + sum(
        len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) + 5 * text.count("<")
        for text in texts
    )


def parsed(path: Path, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The records of a sealed file. Raises ArtifactError where one is damaged."""
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ArtifactError(
                f"{path} line {number} is damaged ({error}): run the stage that made it again"
            ) from None


def _lines(path: Path, rows: set[int]) -> dict[int, dict[str, Any]]:
    """Row -> record, of the rows named."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: run `pocl preprocess`")
    with path.open(encoding="utf-8") as stream:
        kept = {row: line for row, line in enumerate(stream) if row in rows}
    if len(kept) < len(rows):
        raise ArtifactError(
            f"{path} has fewer samples than ranking/order.npy: run `pocl preprocess` and `pocl rank` "
            f"again"
        )
    return dict(zip(kept, parsed(path, iter(kept.values())), strict=True))


def _responses(scores: Path, ids: set[str]) -> dict[str, str]:
    """Id -> what the initial student wrote, from the sealed shards; any whole set of them says the
    same.
    """
    found: dict[str, str] = {}
    for path in sorted(scores.glob("shard-*-of-*.jsonl")):
        if path.with_name(path.name + ".manifest.json").is_file():
            with path.open(encoding="utf-8") as stream:
                found |= {
                    r["id"]: cut(r["response"]) for r in parsed(path, stream) if r["id"] in ids
                }
    return found


def _asked(record: dict[str, Any]) -> str:
    """All that the model is asked, as one text."""
    turns = [f"{role}: {content}" for role, content in record["history"]]
    return "\n\n".join(
        [*turns, record["instruction"], *([record["input"]] if record["input"] else [])]
    )
