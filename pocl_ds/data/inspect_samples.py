"""Samples as text for the terminal, with their scores and places in the difficulty ranking."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pocl_ds.data.conversation import Sample, read_sample_file
from pocl_ds.errors import ArtifactError, RecipeError
from pocl_ds.workflow.files import read_json
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

LINE_WIDTH, MAX_TEXT_LENGTH = 100, 1200  # characters


def format_samples(
    run: RunDirectory, *, split: str = "train", subset: int | None = None, count: int = 5
) -> list[str]:
    """Format `count` samples, spread evenly over a split or over one subset of the ranking.

    Ranked samples come from easy to hard. subset: from 1. Raises RecipeError for a subset that does
    not exist, ArtifactError if the data or the ranking is unfinished.
    """
    if read_manifest(run.data) is None:
        raise ArtifactError(f"{run.data} holds no finished data: run `pocl preprocess` first")
    if count < 1:
        raise RecipeError(f"--n {count}: ask for at least one sample")
    path = run.data / f"{split}.jsonl"
    total = sum(1 for _ in read_sample_file(path))
    if not total:
        raise ArtifactError(f"{path} holds no samples: choose another --split")

    # The candidate rows, ordered by difficulty if there is a ranking.
    rows, captions = np.arange(total), dict[int, str]()
    if subset is not None or (split == "train" and read_manifest(run.ranking) is not None):
        if split != "train":
            raise RecipeError(
                f"--subset {subset} belongs to the ranking, which holds training samples: leave "
                f"--split {split} out"
            )
        rows, captions = _ranked_rows(run, subset)

    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    shown_rows = [int(rows[place]) for place in places]
    samples = {
        row: sample for row, sample in enumerate(read_sample_file(path)) if row in set(shown_rows)
    }
    return [_format_sample(samples[row], captions.get(row, "")) for row in shown_rows]


def _ranked_rows(run: RunDirectory, subset: int | None) -> tuple[Any, dict[int, str]]:
    """Rows of data/train from easy to hard, and a caption of each with its place and scores."""
    if read_manifest(run.ranking) is None:
        raise ArtifactError(
            f"{run.ranking} holds no finished ranking: run `pocl rank` first, or leave --subset out"
        )
    order = np.load(run.ranking / "order.npy")
    table: Mapping[str, Any] = pq.read_table(run.ranking / "ranking.parquet").to_pydict()

    # The part of the order that the subset covers.
    start, stop = 0, len(order)
    if subset is not None:
        if read_manifest(run.plan) is None:
            raise ArtifactError(
                f"{run.plan} holds no finished plan, which defines the subsets: run `pocl plan` "
                "first"
            )
        stops = [stage["stop"] for stage in read_json(run.plan / "plan.json")["stages"]]
        if not 1 <= subset <= len(stops):
            raise RecipeError(f"--subset {subset}: the plan has subsets 1 to {len(stops)}")
        start, stop = [0, *stops][subset - 1], stops[subset - 1]

    metrics = [name for name in ("rouge_l", "cross_entropy") if name in table]
    captions = {}
    for place in range(start, stop):
        scores = [f"{name} {table[name][place]:.3f}" for name in metrics]
        captions[int(order[place])] = "  ".join([f"place {place + 1} of {len(order)}", *scores])
    return order[start:stop], captions


def _format_sample(sample: Sample, caption: str) -> str:
    lines = [f"── {_escape(sample.id)}  {caption}".rstrip()]
    parts = [*sample.history, ("instruction", sample.instruction), ("input", sample.input)]
    parts += [("reference", text) for text in sample.references]
    for label, text in parts:
        if text:
            omitted = len(text) - MAX_TEXT_LENGTH
            if omitted > 0:
                text = f"{text[:MAX_TEXT_LENGTH]} … ({omitted} more characters)"
            body = "\n".join(textwrap.fill(line, LINE_WIDTH) for line in _escape(text).split("\n"))
            lines.append(f"{label}:\n{textwrap.indent(body, '  ')}")
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Escape control characters, so that the terminal does not interpret escape sequences."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )
