"""Training samples to browse: prompt, reference, and the initial student's response."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.errors import ArtifactError
from pocl_ds.workflow.run_dir import RunDirectory

MAX_CHARACTERS = 700  # of a text on the page
RECORD_BYTES = 40  # of a record, besides its texts


@dataclass(frozen=True)
class SampleRow:
    """A training sample on the page."""

    position: int  # in the difficulty ranking, from 0, easiest first
    id: str
    prompt: str
    reference: str
    response: str | None  # of the initial student, None if samples were not scored


@dataclass(frozen=True)
class SampleRows:
    """The samples on the page, evenly spaced along the ranking, of `total`."""

    total: int
    rows: list[SampleRow]


def read_sample_rows(run: RunDirectory, max_rows: int, max_bytes: int) -> SampleRows:
    """Read at most `max_rows` samples whose texts take at most `max_bytes`.

    Raises:
        ArtifactError: a file is damaged, or files contradict each other.
    """
    # Read the samples at evenly spaced positions of the ranking.
    order = np.load(run.ranking / "order.npy", mmap_mode="r")
    positions = evenly_spaced(len(order), max_rows)
    samples = _read_rows(run.data / "train.jsonl", {int(order[i]) for i in positions})
    samples_by_position = {int(i): samples[int(order[i])] for i in positions}
    responses = _read_responses(run.scores, {s.id for s in samples_by_position.values()})
    rows = [
        SampleRow(
            position,
            sample.id,
            truncate(_prompt_text(sample)),
            truncate(sample.response.content),
            responses.get(sample.id),
        )
        for position, sample in samples_by_position.items()
    ]
    # Reduce them, still evenly spaced, until they fit.
    sizes = np.array(
        [embedded_bytes([r.id, r.prompt, r.reference, r.response or ""]) for r in rows], np.int64
    )
    while len(rows) and sizes.sum() > max_bytes:
        remaining = evenly_spaced(len(rows), int(0.98 * len(rows) * max_bytes / sizes.sum()))
        rows, sizes = [rows[i] for i in remaining], sizes[remaining]
    return SampleRows(len(order), rows)


def evenly_spaced(size: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` indices of 0..size-1, evenly spaced, including both ends."""
    if not size or not limit:
        return np.empty(0, np.int64)
    return np.unique(np.linspace(0, size - 1, min(size, limit)).round().astype(np.int64))


def truncate(text: str) -> str:
    """The beginning of a long text, with a mark at its end."""
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " […]"


def embedded_bytes(texts: Sequence[str]) -> int:
    """Bytes that the texts of a record take in the page."""
    return RECORD_BYTES + sum(
        len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) + 5 * text.count("<")
        for text in texts
    )


def parse_lines(path: Path, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The records of a finished JSONL file. Raises ArtifactError for a damaged line."""
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ArtifactError(
                f"{path} line {number} is damaged ({error}): run the step that writes it again"
            ) from None


def _read_rows(path: Path, rows: set[int]) -> dict[int, Sample]:
    """Row -> sample, of these rows of a file."""
    samples = list(read_sample_file(path, rows))
    if len(samples) < len(rows):
        raise ArtifactError(
            f"{path} has fewer samples than ranking/order.npy: run `pocl preprocess` and "
            "`pocl rank` again"
        )
    return dict(zip(sorted(rows), samples))


def _read_responses(scores: Path, ids: set[str]) -> dict[str, str]:
    """Id -> response of the initial student, from the finished shards of scores."""
    responses: dict[str, str] = {}
    for path in sorted(scores.glob("shard-*-of-*.jsonl")):
        if path.with_name(path.name + ".manifest.json").is_file():
            with path.open(encoding="utf-8") as stream:
                responses |= {
                    record["id"]: truncate(record["response"])
                    for record in parse_lines(path, stream)
                    if record["id"] in ids
                }
    return responses


def _prompt_text(sample: Sample) -> str:
    """The turns of the prompt and the input as one text; the only turn without its role."""
    turns = [f"{message.role}: {message.content}" for message in sample.prompt]
    if len(turns) == 1:
        turns = [sample.prompt[0].content]
    return "\n\n".join(filter(None, [*turns, sample.input]))
